"""Django's settings, all from the environment; the defaults serve a fresh clone.

``DATABASE_URL``, ``PORT``, ``ORKESTR_VAR``, ``ORKESTR_STATE_DIR``, ``ORKESTR_HOST_SOCKET``,
``ORKESTR_PUBLIC_URL``, ``ORKESTR_ALLOWED_HOSTS`` (commas), ``ORKESTR_DEBUG``,
``ORKESTR_SECRET_KEY``, ``ORKESTR_TOKEN_PEPPER``, ``ORKESTR_WORKERS``, ``ORKESTR_LOG_LEVEL``,
``ORKESTR_REGION``, ``ORKESTR_LISTEN``, ``ORKESTR_TRUSTED_PROXIES``, ``ORKESTR_WEB_PROCESSES``,
``ORKESTR_WEBHOOK_PERMIT`` and ``ORKESTR_EGRESS_DENY`` (networks, commas).
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import dj_database_url
from django.utils.csp import CSP

from hostruntime.host.patience import scaled
from hostruntime.network.policy import deny_list, parse_networks
from orkestr_console.core import listening, machine
from orkestr_console.core.networks import listed_networks

BASE_DIR = Path(__file__).resolve().parents[1]
VAR = Path(os.environ.get("ORKESTR_VAR") or BASE_DIR / "var").absolute()
HOST_STATE_DIR = Path(os.environ.get("ORKESTR_STATE_DIR") or VAR / "host").absolute()
# Where web processes keep audit entries until they are in the database. `manage.py up` makes it.
AUDIT_SPOOL = VAR / "run/audit"
HOST_SOCKET = Path(os.environ.get("ORKESTR_HOST_SOCKET") or VAR / "run/host.sock").absolute()
PORT = int(os.environ.get("PORT") or 8000)
# Where an operator has said it, links are made with it and not with what a request calls us.
PUBLIC_URL_IS_SET = bool(os.environ.get("ORKESTR_PUBLIC_URL"))
PUBLIC_URL = (os.environ.get("ORKESTR_PUBLIC_URL") or f"http://127.0.0.1:{PORT}").rstrip("/")
# What clients may pin as ``region``: this server is one.
REGION = os.environ.get("ORKESTR_REGION") or "local"
DEBUG = os.environ.get("ORKESTR_DEBUG", "").lower() in {"1", "true", "yes", "on"}

SECRET_KEY = machine.secret("ORKESTR_SECRET_KEY", VAR / "run/secret_key")
# Keys the digests of API tokens. A stolen database alone verifies no token.
TOKEN_PEPPER = machine.secret("ORKESTR_TOKEN_PEPPER", VAR / "run/token_pepper")

# --- Who we are, as browsers see it ---------------------------------------------------------------
_public = urlsplit(PUBLIC_URL)
_https = _public.scheme == "https"
LISTEN = listening.listen_addresses(os.environ.get("ORKESTR_LISTEN"))
# Nobody where there is no proxy: only one that ends TLS has something to say.
TRUSTED_PROXIES = (
    listening.trusted_proxies(os.environ.get("ORKESTR_TRUSTED_PROXIES")) if _https else []
)
ALLOWED_HOSTS = machine.allowed_hosts(_public.hostname, os.environ.get("ORKESTR_ALLOWED_HOSTS", ""))
CSRF_TRUSTED_ORIGINS = [f"{_public.scheme}://{_public.netloc}"]
ROOT_URLCONF = "orkestr_console.urls"
ASGI_APPLICATION = "orkestr_console.asgi.application"

# --- Apps -----------------------------------------------------------------------------------------
INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "axes",
    "channels",
    "django_htmx",
    "django_otp",
    "django_otp.plugins.otp_static",
    "django_otp.plugins.otp_totp",
    "django_q",
    "orkestr_console.runner",
    "orkestr_console.accounts",
    "orkestr_console.installation",
    "orkestr_console.webhooks",
    "orkestr_console.ui",
    "orkestr_console.console",
    "templates_app",
    "sandboxes_app",
]
AUTH_USER_MODEL = "accounts.User"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

MIDDLEWARE = [
    # Answers calls of REST without any of the others.
    "orkestr_console.http.rest.rest",
    # Synchronous only, on purpose: the rest then runs in one thread with no hops between them.
    "orkestr_console.http.middleware.request_id",
    "orkestr_console.http.middleware.release_database",
    "orkestr_console.http.middleware.browser_headers",
    "orkestr_console.http.middleware.CompressedPages",
    "django.middleware.security.SecurityMiddleware",
    # Before the static files, which are framed and sniffed no more than pages are.
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django.middleware.csp.ContentSecurityPolicyMiddleware",
    "orkestr_console.http.middleware.reject_nul",
    "orkestr_console.http.middleware.StaticFiles",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django_htmx.middleware.HtmxMiddleware",
    "orkestr_console.http.middleware.DomainErrors",
]

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.template.context_processors.csp",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
                "orkestr_console.accounts.context.team_and_plan",
            ]
        },
    }
]

# --- Database -------------------------------------------------------------------------------------
DATABASES: dict[str, Any] = {
    "default": {
        **dj_database_url.parse(
            os.environ.get("DATABASE_URL") or f"postgres://orkestr@/orkestr?host={VAR}/run/pg"
        ),
        "ENGINE": "orkestr_console.core.database",
        # Without the check, the first requests after a restart of PostgreSQL fail.
        "CONN_HEALTH_CHECKS": True,
        "CONN_MAX_AGE": 0,
        "ATOMIC_REQUESTS": False,
    }
}
DATABASES["default"].setdefault("OPTIONS", {}).update(
    {
        "pool": {
            "min_size": 1,
            "max_size": 16,
            "timeout": scaled(15),
            "max_idle": 300,
            # A lost connection is tried for again at growing intervals for so long; then whoever
            # next needs one tries at once. With the usual five minutes, a pool that was full when
            # the database went may be empty for minutes after it has come back.
            "reconnect_timeout": 3,
        },
        "application_name": "orkestr",
        # Each connection plans a statement once: planning often takes longer than running it.
        "server_side_binding": True,
        "prepare_threshold": 2,
    }
)

# How many web processes share the port, and the most connections that they have together, of the
# hundred that PostgreSQL allows (max_connections): the workers and notices take some as well.
WEB_PROCESSES = machine.web_processes(os.environ.get("ORKESTR_WEB_PROCESSES", ""))
WEB_CONNECTIONS = 48

# How long no request at all may have got a connection of the pool before those that wait are told
# to come back: not long, but on a slow machine as long as one takes to be made. Workers have no
# pool.
REQUEST_POOL_SECONDS = scaled(1.5)

# --- Sign-in --------------------------------------------------------------------------------------
LOGIN_BACKEND = "django.contrib.auth.backends.ModelBackend"
AUTHENTICATION_BACKENDS = ["axes.backends.AxesStandaloneBackend", LOGIN_BACKEND]
# Five wrong passwords for one account from one address, and that pair waits.
AXES_FAILURE_LIMIT = 5
AXES_COOLOFF_TIME = timedelta(minutes=15)
# What `authenticate()` is given; axes would look for the name of our model's field.
AXES_USERNAME_FORM_FIELD = "username"
AXES_LOCKOUT_PARAMETERS = [["username", "ip_address"]]
AXES_RESET_ON_SUCCESS = True
AXES_DISABLE_ACCESS_LOG = True
AXES_VERBOSE = False
OTP_TOTP_ISSUER = "Orkestr Console"
PASSWORD_HASHERS = [
    "django.contrib.auth.hashers.Argon2PasswordHasher",
    "django.contrib.auth.hashers.PBKDF2PasswordHasher",
]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}"}
    for name in (
        "UserAttributeSimilarityValidator",
        "MinimumLengthValidator",
        "CommonPasswordValidator",
        "NumericPasswordValidator",
    )
]
LOGIN_URL = "console:sign_in"
LOGIN_REDIRECT_URL = "/"
LOGOUT_REDIRECT_URL = "console:sign_in"

# --- What browsers are told -----------------------------------------------------------------------
# Two consoles on one machine differ by port alone, which cookies do not tell apart.
# With TLS the browser is held to our host and path too, whatever a sibling host sets (RFC 6265bis,
# 4.1.3.2); without it, browsers refuse the prefix.
_host_only = "__Host-" if _https else ""
SESSION_COOKIE_NAME = f"{_host_only}orkestr_session_{PORT}"
CSRF_COOKIE_NAME = f"{_host_only}orkestr_csrf_{PORT}"
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = _https
SESSION_COOKIE_HTTPONLY = True
# Forms carry the token; no script reads the cookie.
CSRF_COOKIE_HTTPONLY = True
SESSION_COOKIE_SAMESITE = CSRF_COOKIE_SAMESITE = "Lax"
SESSION_COOKIE_AGE = 14 * 24 * 3600
CSRF_FAILURE_VIEW = "orkestr_console.http.health.csrf_failure"
X_FRAME_OPTIONS = "DENY"
# No other site learns an address of ours, and so no invitation's secret. Not "no-referrer": with
# that browsers send "Origin: null" with a form, which says nothing of where it came from.
SECURE_REFERRER_POLICY = "same-origin"
SECURE_CONTENT_TYPE_NOSNIFF = True
SECURE_CROSS_ORIGIN_OPENER_POLICY = "same-origin"
SECURE_SSL_REDIRECT = False
SECURE_HSTS_SECONDS = 365 * 24 * 3600 if _https else 0
# A public https address means that a proxy in front ends TLS and says so.
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https") if _https else None
SECURE_CSP: dict[str, list[str]] = {
    "default-src": [CSP.NONE],
    "script-src": [CSP.SELF, CSP.NONCE],
    "style-src": [CSP.SELF, CSP.NONCE],
    "img-src": [CSP.SELF],
    "connect-src": [CSP.SELF],
    "object-src": [CSP.NONE],
    "base-uri": [CSP.NONE],
    "form-action": [CSP.SELF],
    "frame-ancestors": [CSP.NONE],
}
# The console is often served on plain http inside a network; then there is no TLS to insist on
# (W004 HSTS, W008 redirect, W012 and W016 Secure cookies). With an https ORKESTR_PUBLIC_URL all of
# it is on but the redirect (W008), and HSTS is not forced on sibling hosts or preload lists (W005,
# W021), which belong to the operator's domain and not to one service on it. axes' own middleware
# (W002) would answer a lock-out with a page of its own; our form says it in place.
SILENCED_SYSTEM_CHECKS = [
    "axes.W002",
    "security.W008",
    *(
        ["security.W005", "security.W021"]
        if _https
        else ["security.W004", "security.W012", "security.W016"]
    ),
]

# --- Long answers ---------------------------------------------------------------------------------
# Whether clients that wait hear 1xx answers: not behind a proxy that takes one for the answer.
INTERIM_ANSWERS = os.environ.get("ORKESTR_INTERIM_ANSWERS", "").lower() not in {"off", "0", "no"}

# --- Bodies ---------------------------------------------------------------------------------------
# The largest body any call takes (a 16 MiB file in base64, with its JSON around it).
LARGEST_BODY = 24 * 1024 * 1024
# What a call takes that does not say more: a command of 256 KiB, each character as JSON's \\u0000.
USUAL_BODY = 2 * 1024 * 1024
DATA_UPLOAD_MAX_MEMORY_SIZE = LARGEST_BODY
FILE_UPLOAD_MAX_MEMORY_SIZE = USUAL_BODY

# --- Webhooks -------------------------------------------------------------------------------------
# What they may not reach, which is what sandboxes may not: but for the networks that the operator
# permits, for receivers inside.
_permit = listed_networks("ORKESTR_WEBHOOK_PERMIT", os.environ)
WEBHOOK_DENIED = deny_list(listed_networks("ORKESTR_EGRESS_DENY", os.environ), _permit)
WEBHOOK_PERMITTED = parse_networks(_permit)

# --- Static files ---------------------------------------------------------------------------------
STATIC_URL = "/static/"
STATIC_ROOT = VAR / "static"
STATICFILES_DIRS = [BASE_DIR / "static"]
STATICFILES_FINDERS = [
    "django.contrib.staticfiles.finders.FileSystemFinder",
    "django.contrib.staticfiles.finders.AppDirectoriesFinder",
    "orkestr_console.ui.bundles.BundleFinder",
]
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {
        # Names with a hash, so that browsers keep files for good; compressed when collected.
        "BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"
        if DEBUG
        else "whitenoise.storage.CompressedManifestStaticFilesStorage"
    },
}

# --- Notices and tasks ----------------------------------------------------------------------------
CHANNEL_LAYERS = {"default": {"BACKEND": "orkestr_console.core.channel_layer.PgChannelLayer"}}

# Tasks are short: a build's begins a thread. State, attempts and cancel live on our own rows; a
# task that fails is never tried again by the queue. A worker is not recycled: it follows builds.
Q_CLUSTER: dict[str, Any] = {
    "name": "orkestr",
    "broker_class": "orkestr_console.queue.broker.PgBroker",
    "orm": "default",
    "workers": int(os.environ.get("ORKESTR_WORKERS") or 3),
    "timeout": 3600,
    "retry": 7200,
    "recycle": 0,
    "max_attempts": 1,
    "ack_failures": True,
    "catch_up": False,
    "save_limit": 250,
    "label": "Queue",
}
# A process of the worker's that does nothing for so long, and comes round no more, is replaced.
WORKER_STALE_SECONDS = float(os.environ.get("ORKESTR_WORKER_STALE") or scaled(30))
# How many builds this machine runs at once, whatever the plans of its teams allow.
BUILDS_AT_ONCE = machine.max_concurrent_builds()
# What runs by the clock: (name, function, every so many minutes).
PERIODIC_TASKS = [
    ("Begin builds, resume those whose driver is gone", "templates_app.tasks.drive_builds", 1),
    ("Set aside images that no template names", "templates_app.tasks.reconcile_images", 15),
    ("Expire sandboxes, reconcile with the host", "sandboxes_app.tasks.tidy", 1),
    ("Forget old deliveries to webhooks", "orkestr_console.webhooks.tasks.tidy", 1),
]

# What a process of its own does all the time: it hears from the host what has ended.
LISTENER = "sandboxes_app.tasks.listen"

# --- Logs -----------------------------------------------------------------------------------------
# To standard error, which the process manager keeps. Django's own handlers are taken away: without
# DEBUG they say nothing of a failed request.
LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"()": "hostruntime.host.logs.LineFormatter"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {
        "handlers": ["stderr"],
        "level": (os.environ.get("ORKESTR_LOG_LEVEL") or "WARNING").upper(),
    },
    "loggers": {
        "django": {"handlers": [], "level": "NOTSET", "propagate": True},
        # A client's own mistakes are answered, not logged: a stranger could fill the disk.
        "django.request": {"level": "ERROR"},
        "django.server": {"handlers": [], "propagate": True},
        "django.security.DisallowedHost": {"level": "CRITICAL"},
        # What they say below that are whole contexts of pages and values of statements: secrets.
        "django.template": {"level": "INFO"},
        "django.db.backends": {"level": "INFO"},
        "django-q": {"level": "INFO"},
    },
}

# --- The rest -------------------------------------------------------------------------------------
USE_TZ = True
TIME_ZONE = "UTC"
USE_I18N = False
LANGUAGE_CODE = "en"
MESSAGE_STORAGE = "django.contrib.messages.storage.session.SessionStorage"
