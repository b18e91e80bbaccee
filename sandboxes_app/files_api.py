"""A sandbox's files over REST, and the signed addresses for large ones."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from django.conf import settings
from django.http import HttpRequest, HttpResponse, HttpResponseBase

from orkestr_console.accounts.actor import READ, WRITE
from orkestr_console.core.addresses import console_address
from orkestr_console.core.errors import (
    Conflict,
    Forbidden,
    HostUnavailable,
    LengthRequired,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    RangeNotSatisfiable,
    RateLimited,
)
from orkestr_console.core.hosts import Steps
from orkestr_console.http.decorators import ApiRequest, admits_itself, api
from orkestr_console.http.describing import BYTES, Parameter, describe
from orkestr_console.http.json_api import json_response, no_content, read_json
from orkestr_console.http.ranges import EVERYTHING, wanted_part
from orkestr_console.http.steps import to_its_end
from orkestr_console.http.straight import outlet
from orkestr_console.http.streams import OwningStream
from orkestr_console.http.threads import in_thread
from orkestr_console.http.uploads import cut_off, request_body
from sandboxes_app import presenters, services
from sandboxes_app.answers import (
    BatchResults,
    PathContent,
    PathStat,
    PresignedAddress,
    WrittenFile,
)
from sandboxes_app.models import Sandbox
from sandboxes_app.specs import BatchSpec, DirectorySpec, FileSpec, MoveSpec, PresignSpec

PATH = Parameter(
    "path",
    {"type": "string", "pattern": "^/", "examples": ["/workspace/hello.txt"]},
    "An absolute path in the sandbox.",
    required=True,
)
# Of an address: it was changed, has expired or was used, its token or sandbox is gone.
TRANSFER_ERRORS = (
    Forbidden,
    NotFound,
    MethodNotAllowed,
    Conflict,
    RateLimited,
    HostUnavailable,
)
RANGE = Parameter(
    "Range",
    {"type": "string"},
    "One range of bytes (RFC 9110, section 14), such as `bytes=0-99`.",
    where="header",
)


@describe(
    "Read a file or list a directory",
    notes="A file of at most 16 MiB.",
    parameters=(PATH,),
    answer=PathContent,
    errors=(Conflict, PayloadTooLarge),
)
@api(scope=READ, subject=Sandbox)
def read_path(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``GET …/files?path=``: a file or a directory."""
    found = yield from services.read_path.steps(request.actor, sandbox_id, request.GET.get("path"))
    return json_response(presenters.path_content(found))


@describe(
    "Write a file",
    notes="At most 16 MiB; for more, get an address with presign-upload.",
    body=FileSpec,
    example={"path": "/workspace/hello.txt", "content": "SGVsbG8K"},
    answer=WrittenFile,
    errors=(Conflict,),
)
@api(scope=WRITE, subject=Sandbox)
def write_file(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``POST …/files``."""
    spec = read_json(request, FileSpec, max_bytes=settings.LARGEST_BODY)
    written = yield from services.write_file.steps(request.actor, sandbox_id, spec)
    return json_response(WrittenFile(path=spec.path, bytes_written=written))


@describe("Delete a file or directory", parameters=(PATH,), status=204, errors=(Conflict,))
@api(scope=WRITE, subject=Sandbox)
def delete_path(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``DELETE …/files?path=``."""
    yield from services.delete_path.steps(request.actor, sandbox_id, request.GET.get("path"))
    return no_content()


@describe(
    "Create a directory",
    body=DirectorySpec,
    example={"path": "/workspace/data"},
    status=204,
    errors=(Conflict,),
)
@api(scope=WRITE, subject=Sandbox)
def mkdir(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``POST …/files/mkdir``."""
    yield from services.mkdir.steps(request.actor, sandbox_id, read_json(request, DirectorySpec))
    return no_content()


@describe(
    "Move a file or directory",
    body=MoveSpec,
    example={"source": "/workspace/a.txt", "destination": "/workspace/b.txt"},
    status=204,
    errors=(Conflict,),
)
@api(scope=WRITE, subject=Sandbox)
def move(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``POST …/files/move``."""
    yield from services.move.steps(request.actor, sandbox_id, read_json(request, MoveSpec))
    return no_content()


@describe(
    "Look at a path",
    notes="A missing one is `exists: false`, and no error.",
    parameters=(PATH,),
    answer=PathStat,
    errors=(Conflict,),
)
@api(scope=READ, subject=Sandbox)
def stat(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``GET …/files/stat?path=``: a missing path is ``exists: false``, not an error."""
    found = yield from services.stat.steps(request.actor, sandbox_id, request.GET.get("path"))
    return json_response(presenters.path_stat(found))


@describe(
    "Write several files",
    notes="Each succeeds or fails on its own.",
    body=BatchSpec,
    example={"files": [{"path": "/workspace/a.txt", "content": "QQo="}]},
    answer=BatchResults,
    errors=(Conflict,),
)
@api(scope=WRITE, subject=Sandbox)
def write_batch(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``POST …/files/batch``: each file succeeds or fails on its own."""
    spec = read_json(request, BatchSpec, max_bytes=settings.LARGEST_BODY)
    rows = yield from services.write_batch.steps(request.actor, sandbox_id, spec)
    return json_response(presenters.batch_rows(rows))


@describe(
    "Get an address to send a file to",
    body=PresignSpec,
    example={"path": "/workspace/large.bin"},
    answer=PresignedAddress,
    errors=(Conflict,),
)
@api(scope=WRITE, subject=Sandbox)
def presign_upload(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``POST …/files/presign-upload``."""
    spec = read_json(request, PresignSpec)
    address = yield from services.presign_upload.steps(request.actor, sandbox_id, spec)
    return json_response(presenters.presigned(address, console_address(request)))


@describe(
    "Get an address to fetch a file from",
    body=PresignSpec,
    example={"path": "/workspace/large.bin"},
    answer=PresignedAddress,
    errors=(Conflict,),
)
@api(scope=READ, subject=Sandbox)
def presign_download(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``POST …/files/presign-download``."""
    spec = read_json(request, PresignSpec)
    address = yield from services.presign_download.steps(request.actor, sandbox_id, spec)
    return json_response(presenters.presigned(address, console_address(request)))


@describe(
    "Send a file",
    notes="To an address of presign-upload. The body is the file; its length has to be said.",
    reads=BYTES,
    answer=WrittenFile,
    errors=(*TRANSFER_ERRORS, LengthRequired, PayloadTooLarge),
)
@admits_itself
async def upload(request: HttpRequest, address: str) -> HttpResponse:
    """``PUT /v1/transfers/{address}``: the body is the file."""
    length = request.META.get("CONTENT_LENGTH", "")
    if not length.isdigit():
        raise LengthRequired
    transfer = await services.begin_upload(address, request.META.get("REMOTE_ADDR"))
    outcome = await services.run_upload(transfer, int(length), request_body(request))
    return await to_its_end(in_thread(upload_answer, transfer, outcome))


def upload_answer(transfer: services.Transfer, outcome: services.UploadOutcome) -> HttpResponse:
    """What runs in a thread after an upload, also if the client leaves meanwhile: the record."""
    written = services.conclude_upload(transfer, outcome)
    return json_response(WrittenFile(path=transfer.address.path, bytes_written=written))


@describe(
    "Fetch a file",
    notes="From an address of presign-download.",
    parameters=(RANGE,),
    also={BYTES: {}},
    statuses={206: "The part that the `Range` header asks for."},
    errors=(*TRANSFER_ERRORS, RangeNotSatisfiable),
)
@admits_itself
async def download(request: HttpRequest, address: str) -> HttpResponseBase:
    """``GET /v1/transfers/{address}``: the file, or the part that a ``Range`` header asks for."""
    client = request.META.get("REMOTE_ADDR")
    file = services.Download(await in_thread(services.begin_download, address, client))
    # No file of ours has what If-Range could match (RFC 9110, section 13.1.5).
    conditional = "If-Range" in request.headers
    wanted = EVERYTHING if conditional else wanted_part(request.headers.get("Range"))
    part = await file.open(wanted)
    headers = presenters.file_headers(file.path, part, partial=wanted != EVERYTHING)
    status = 200 if wanted == EVERYTHING else 206
    if request.method == "HEAD":
        await file.aclose()
        return HttpResponse(status=status, headers=headers)
    return OwningStream(
        file_content(request, file, part.length), file, status=status, headers=headers
    )


async def file_content(
    request: HttpRequest, file: services.Download, left: int
) -> AsyncIterator[bytes]:
    """The bytes, but for those that go straight to the client's socket.

    If there are fewer than promised, the end of the connection says so.
    """
    sent = 0
    with outlet(request) as client:
        async with aclosing(file.pieces()) as pieces:
            async for piece in pieces:
                if client is None or not sent:
                    yield bytes(piece)
                elif not await client.send(piece):
                    break
                sent += len(piece)
    if sent < left:
        cut_off(request)
