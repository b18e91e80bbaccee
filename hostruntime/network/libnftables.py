"""Loading nftables rules with nft's own library (libnftables(3)), without starting nft(8).

For the namespace of a slot, which is created for every container, and whose rules are ours alone:
to start the program takes five times as long as what it does. The host's own table, beside which
anybody's rules may be, is left to the program (:mod:`hostruntime.network.firewall`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import threading
from functools import cache

from hostruntime.errors import HostFault, HostUnavailable

# Debian's package nftables depends on it.
_LIBRARY = "libnftables.so.1"
_MAX_MESSAGE_CHARACTERS = 500
_NETLINK_NETFILTER = 12  # linux/netlink.h
# More than it needs: other threads may take some meanwhile.
_FREE_DESCRIPTORS = 16
# The library keeps a part of its state in global variables.
_lock = threading.Lock()


def load_rules(rules: str) -> None:
    """Carry out commands like `nft -f`, all or none, in the calling thread's network namespace.

    Raises HostFault with what the library says, HostUnavailable if it is not installed, OSError
    if there is no descriptor or socket for it.
    """
    library = _library()
    with _lock:
        _require_socket()
        context = library.nft_ctx_new(0)
        if not context:
            raise HostFault("There is not enough memory to load network rules.")
        try:
            library.nft_ctx_buffer_error(context)
            if library.nft_run_cmd_from_buffer(context, rules.encode()):
                message = library.nft_ctx_get_error_buffer(context) or b""
                text = message.decode("utf-8", "replace").strip()[:_MAX_MESSAGE_CHARACTERS]
                raise HostFault(f"The network rules of a sandbox cannot be loaded: {text}")
        finally:
            library.nft_ctx_free(context)


def _require_socket() -> None:
    """Raise OSError where the library would end this process: it exits if it gets no socket."""
    with contextlib.ExitStack() as opened:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        handle = socket.socket(socket.AF_NETLINK, kind, _NETLINK_NETFILTER)
        opened.enter_context(handle)
        for _ in range(_FREE_DESCRIPTORS - 1):
            opened.callback(os.close, os.dup(handle.fileno()))


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise HostUnavailable(f"{error}. Install nftables with its library {_LIBRARY}.") from error
    library.nft_ctx_new.restype = ctypes.c_void_p
    library.nft_ctx_new.argtypes = [ctypes.c_uint32]
    library.nft_ctx_free.argtypes = library.nft_ctx_buffer_error.argtypes = [ctypes.c_void_p]
    library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    library.nft_ctx_get_error_buffer.argtypes = [ctypes.c_void_p]
    library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
    return library
