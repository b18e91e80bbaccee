"""The optional second factor: time-based codes (RFC 6238) with django-otp, and recovery codes."""

from __future__ import annotations

from base64 import b32encode

import segno
from django.db import transaction
from django_otp import devices_for_user, match_token
from django_otp.plugins.otp_static.models import StaticDevice, StaticToken
from django_otp.plugins.otp_totp.models import TOTPDevice

from orkestr_console.accounts.models import User
from orkestr_console.core.errors import InvalidInput

RECOVERY_CODES = 10
APP_DEVICE_NAME = "Authenticator app"
CODES_DEVICE_NAME = "Recovery codes"
WRONG_CODE = "Invalid or already used code. Wait for a new one and try again."


def is_on(user: User) -> bool:
    """Whether signing in requires a code."""
    return any(isinstance(device, TOTPDevice) for device in devices_for_user(user))


def codes_left(user: User) -> int:
    """How many recovery codes are unused."""
    return int(StaticToken.objects.filter(device__user=user).count())


@transaction.atomic
def begin(user: User) -> TOTPDevice:
    """Create a secret to scan, which has no effect until its first code is entered."""
    if is_on(user):
        raise InvalidInput("Two-step sign-in is already on; turn it off first.")
    TOTPDevice.objects.filter(user=user, confirmed=False).delete()
    return TOTPDevice.objects.create(user=user, name=APP_DEVICE_NAME, confirmed=False)


def pending(user: User) -> TOTPDevice | None:
    """The secret that is waiting for its first code."""
    return TOTPDevice.objects.filter(user=user, confirmed=False).first()


@transaction.atomic
def confirm(user: User, code: str) -> list[str]:
    """Turn it on with a first code; the recovery codes, which cannot be retrieved again.

    Raises ``InvalidInput`` for a wrong code.
    """
    device = TOTPDevice.objects.select_for_update().filter(user=user, confirmed=False).first()
    if device is None:
        raise InvalidInput("There is nothing to confirm; start again.")
    if not device.verify_token(normalize_code(code)):
        raise InvalidInput(WRONG_CODE, fields={"code": WRONG_CODE})
    device.confirmed = True
    device.save(update_fields=["confirmed"])
    return replace_codes(user)


def replace_codes(user: User) -> list[str]:
    """Replace the recovery codes; the new ones."""
    StaticDevice.objects.filter(user=user).delete()
    device = StaticDevice.objects.create(user=user, name=CODES_DEVICE_NAME)
    codes = [StaticToken.random_token() for _ in range(RECOVERY_CODES)]
    StaticToken.objects.bulk_create(StaticToken(device=device, token=code) for code in codes)
    return codes


def verify(user: User, code: str) -> bool:
    """Whether ``code`` is the app's, or a recovery code, which is then consumed.

    django-otp makes repeated guesses wait longer and longer.
    """
    return match_token(user, normalize_code(code)) is not None


@transaction.atomic
def turn_off(user: User) -> None:
    """Turn two-step sign-in off."""
    TOTPDevice.objects.filter(user=user).delete()
    StaticDevice.objects.filter(user=user).delete()


def normalize_code(code: str) -> str:
    """A code without the spaces that apps show: ``123 456``."""
    return "".join(code.split()).lower()


def qr_code(device: TOTPDevice) -> str:
    """The secret as a QR code: an SVG element."""
    return str(
        segno.make(device.config_url, error="m").svg_inline(
            scale=4, border=3, dark="#000", light="#fff", omitsize=False
        )
    )


def secret_text(device: TOTPDevice) -> str:
    """The secret in groups of four, for typing it without a camera."""
    text = b32encode(device.bin_key).decode().rstrip("=")
    return " ".join(text[at : at + 4] for at in range(0, len(text), 4))
