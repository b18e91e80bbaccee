"""nft's own library (libnftables(3)), in a process that serves the agent with it.

To start nft(8) takes five times as long as what it does.  But the library is not for the agent's
own process: it waits by select(2), which the C library aborts for a descriptor from 1024 on, and it
calls exit(3) if it gets no memory or socket.  So this process has it: ``python -m
hostruntime.network.libnftables SOCKET NAMESPACE``, with the descriptors of a socket to the agent,
and of the agent's network namespace.  The other end is :mod:`hostruntime.network.nft_process`.

It carries out one request at a time, in the network namespace whose descriptor comes with it, and
is in the agent's meanwhile: it keeps no slot's namespace from going away.  It holds no other
descriptor, and exits when the agent's end of the socket is closed, even if the library hangs.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import sys
import threading
from collections.abc import Mapping
from functools import cache
from typing import Any

from hostruntime.host import channel, kernel

# Debian's package nftables depends on it.
_LIBRARY = "libnftables.so.1"
_OUTPUT_JSON = 1 << 4  # NFT_CTX_OUTPUT_JSON of nftables/libnftables.h
_MAX_MESSAGE_CHARACTERS = 500
_TITLE = "orkestr hostruntime.network.libnftables"


class NftError(Exception):
    """The library refused the commands; none has been carried out."""


def run_commands(commands: str, *, as_json: bool = False) -> str:
    """Carry out commands like `nft -f`, all or none, in this thread's network namespace.

    Returns what they print, like `nft -j` with ``as_json``.  Raises NftError with what the library
    says, OSError if it is not installed.
    """
    library = _library()
    context = library.nft_ctx_new(0)
    if not context:
        raise NftError("there is not enough memory")
    try:
        library.nft_ctx_buffer_error(context)
        library.nft_ctx_buffer_output(context)
        library.nft_ctx_output_set_flags(context, _OUTPUT_JSON if as_json else 0)
        if library.nft_run_cmd_from_buffer(context, commands.encode()):
            message = _text(library.nft_ctx_get_error_buffer(context)).strip()
            raise NftError(message[:_MAX_MESSAGE_CHARACTERS])
        return _text(library.nft_ctx_get_output_buffer(context))
    finally:
        library.nft_ctx_free(context)


def _text(data: bytes | None) -> str:
    return (data or b"").decode("utf-8", "replace")


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(_LIBRARY)
    library.nft_ctx_new.restype = ctypes.c_void_p
    library.nft_ctx_new.argtypes = [ctypes.c_uint32]
    library.nft_ctx_free.argtypes = [ctypes.c_void_p]
    library.nft_ctx_output_set_flags.argtypes = [ctypes.c_void_p, ctypes.c_uint]
    library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    for what in ("error", "output"):
        getattr(library, f"nft_ctx_buffer_{what}").argtypes = [ctypes.c_void_p]
        get = getattr(library, f"nft_ctx_get_{what}_buffer")
        get.argtypes, get.restype = [ctypes.c_void_p], ctypes.c_char_p
    return library


# The process ---------------------------------------------------------------------------------


def serve(sock: socket.socket, home: int) -> None:
    """Serve the agent, whose namespace is ``home``, until its end of ``sock`` is closed."""
    threading.Thread(target=_exit_with, args=(sock.fileno(),), daemon=True).start()
    while True:
        try:
            message, (namespace,) = channel.receive(sock)
        except channel.ChannelClosed:
            return
        os.setns(namespace, os.CLONE_NEWNET)
        answer = _answer(message)
        # Before the caller hears of it, who expects nobody in the namespace.
        os.setns(home, os.CLONE_NEWNET)
        os.close(namespace)
        channel.send(sock, answer)


def _answer(message: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {"output": run_commands(message["commands"], as_json=message["json"])}
    except NftError as error:
        return {"refused": str(error)}
    except OSError as error:
        return {"unavailable": str(error)}


def _exit_with(socket_fd: int) -> None:
    """Exit when the other end of the socket is closed, whatever the other thread waits for."""
    poller = select.poll()
    # POLLHUP is reported unasked (poll(2)).
    poller.register(socket_fd, 0)
    poller.poll()
    os._exit(0)


def main() -> None:
    """Serve; arguments: a socket's descriptor and a network namespace's."""
    kernel.set_command_line(_TITLE)
    descriptor, home = map(int, sys.argv[1:])
    os.setns(home, os.CLONE_NEWNET)
    with socket.socket(fileno=descriptor) as sock:
        serve(sock, home)


if __name__ == "__main__":
    main()
