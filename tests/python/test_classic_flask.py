"""The Flask-shaped request that backends get after `serve.init`: over a proxy and a replica in this process."""

from __future__ import annotations

import asyncio
import copy
import io
import types
from pathlib import Path
from typing import Any

import pytest
import requests
from classic_replica import backend
from http_pair import ours

from rayserve_fast import serve
from rayserve_fast.classic.backend import AsyncBackend, Backend, SyncBackend
from rayserve_fast.classic.requests import FlaskRequest, HandleRequest
from rayserve_fast.classic.session import FLASK
from rayserve_fast.classic.uploads import FileStorage


def flask_parts(flask_request: Any) -> dict[str, Any]:
    r = flask_request
    return {
        "method": r.method,
        "path": r.path,
        "full_path": r.full_path,
        "args": r.args,
        "lists": r.args.to_dict(flat=False),
        "number": r.args.get("n", 0, type=int),
        "numbers": r.args.getlist("n", type=int),
        "all": [
            sorted(r.args.lists()),
            list(r.args.listvalues()),
            list(r.args.items(multi=True)),
            list(r.args.items()),
        ],
        "form": r.form,
        "values": r.values,
        "files": {name: [file.filename, file.read().decode()] for name, file in r.files.items()},
        "data": r.data.decode(),
        "raw": r.get_data(as_text=True),
        "json": r.json,
        "forced": r.get_json(force=True, silent=True),
        "header": r.headers.get("X-One"),
        "cookies": r.cookies,
        "mimetype": r.mimetype,
        "url": r.url,
        "remote": r.remote_addr,
        "web": serve.context.web,
        "batch_size": serve.context.batch_size,
    }


async def flask_parts_async(flask_request: Any) -> dict[str, Any]:
    await asyncio.sleep(0)
    return flask_parts(flask_request)


@pytest.mark.parametrize(
    ("function", "kind"), [(flask_parts, SyncBackend), (flask_parts_async, AsyncBackend)], ids=["sync", "async"]
)
def test_a_flask_shaped_request_has_plain_values(function: Any, kind: type[Backend]) -> None:
    with backend(function, FLASK, kind=kind) as url:
        got = requests.get(f"{url}/a%20b?n=1&n=2&empty=", headers={"x-one": "1"}, cookies={"c": "2"}).json()
        assert got["method"] == "GET"
        assert (got["path"], got["full_path"]) == ("/a b", "/a b?n=1&n=2&empty=")
        assert (got["args"], got["lists"]) == ({"n": "1", "empty": ""}, {"n": ["1", "2"], "empty": [""]})
        assert got["numbers"] == [1, 2]
        lists, pairs = [["empty", [""]], ["n", ["1", "2"]]], [["n", "1"], ["n", "2"], ["empty", ""]]
        assert got["all"] == [lists, [["1", "2"], [""]], pairs, [["n", "1"], ["empty", ""]]]
        assert (got["number"], got["header"], got["cookies"]) == (1, "1", {"c": "2"})
        assert (got["json"], got["data"], got["form"]) == (None, "", {})
        assert (got["remote"], got["url"]) == ("127.0.0.1", f"{url}/a%20b?n=1&n=2&empty=")
        assert (got["web"], got["batch_size"]) == (True, None)

        got = requests.post(url, json={"x": [1]}).json()
        assert (got["json"], got["forced"], got["data"]) == ({"x": [1]}, {"x": [1]}, '{"x": [1]}')

        got = requests.post(url, data='{"x": 1}').json()
        assert (got["json"], got["forced"], got["mimetype"]) == (None, {"x": 1}, "")

        got = requests.post(f"{url}?a=q", data={"a": "f", "b": "2 é"}).json()
        assert (got["form"], got["values"]) == ({"a": "f", "b": "2 é"}, {"a": "q", "b": "2 é"})
        assert (got["data"], got["raw"]) == ("", "a=f&b=2+%C3%A9")

        got = requests.post(url, data=b"a=\xff", headers={"content-type": "application/x-www-form-urlencoded"}).json()
        assert (got["form"], got["raw"]) == ({"a": "\ufffd"}, "a=\ufffd")

        got = requests.post(url, data={"t": "v"}, files={"f": ("n.txt", b"hello")}).json()
        assert (got["form"], got["files"]) == ({"t": "v"}, {"f": ["n.txt", "hello"]})

        upper = {"content-type": "Multipart/Form-Data; boundary=b"}
        parts = b'--b\r\ncontent-disposition: form-data; name="t"\r\n\r\nv\r\n--b--\r\n'
        got = requests.post(url, data=parts, headers=upper).json()
        assert (got["form"], got["mimetype"]) == ({"t": "v"}, "multipart/form-data")

        large = "x" * 1_000_000
        assert requests.post(url, data=large).json()["data"] == large


def test_a_json_body_that_cannot_be_read_is_an_error_unless_silent() -> None:
    request = FlaskRequest.of_call(HandleRequest("{", {}))
    assert request.get_json(force=True, silent=True) is None
    with pytest.raises(ValueError, match="property name"):
        request.get_json(force=True)


def reads_json(flask_request: Any) -> Any:
    return flask_request.get_json(force=True) if flask_request.args else flask_request.json


async def reads_json_async(flask_request: Any) -> Any:
    return reads_json(flask_request)


@serve.accept_batch
def reads_jsons(flask_requests: list[Any]) -> list[Any]:
    results: list[Any] = []
    for request in flask_requests:
        try:
            results.append(reads_json(request))
        except ValueError as error:
            results.append(error)
    return results


@pytest.mark.parametrize(
    ("function", "kind", "options"),
    [
        (reads_json, SyncBackend, {}),
        (reads_json_async, AsyncBackend, {}),
        (reads_jsons, SyncBackend, {"max_batch_size": 2}),
    ],
    ids=["sync", "async", "batch"],
)
def test_a_client_that_sends_no_json_is_answered_400(function: Any, kind: type[Backend], options: Any) -> None:
    with ours(kind, "/", "", function, (), FLASK, **options) as (host, port):
        url = f"http://{host}:{port}"
        for where, body in ((url, b"{"), (f"{url}?force=1", b""), (url, b'"\xff"')):
            answer = requests.post(where, data=body, headers={"content-type": "application/json"}, timeout=30)
            assert answer.status_code == 400
            assert answer.text.startswith("The body of the request is not JSON: ")
        assert requests.post(url, json=[1], timeout=30).json() == [1]


def reads_headers(flask_request: Any) -> Any:
    headers = flask_request.headers
    return {
        "dict": dict(headers)["X-Two"],
        "pairs": [value for name, value in headers if name == "X-Two"],
        "names": [sorted(headers.keys()).count("X-Two") == 1, "x-two" in headers, ("X-Two", "2") in headers.items()],
        "number": [headers.get("x-two", type=int), headers.get("X-Text", 7, type=int), headers.get("X-No", 8)],
        "mime": flask_request.mimetype,
    }


def test_headers_have_the_names_and_pairs_of_werkzeug_s() -> None:
    said = {"x-two": "2", "x-text": "two", "content-type": "text/csv"}
    with backend(reads_headers, FLASK, kind=SyncBackend) as url:
        over_http = requests.get(url, headers=said).json()
    assert over_http == reads_headers(FlaskRequest.of_call(HandleRequest(given_headers=said)))
    assert over_http == {"dict": "2", "pairs": ["2"], "names": [True] * 3, "number": [2, 7, 8], "mime": "text/csv"}


def test_a_flask_shaped_request_knows_its_client() -> None:
    def told(flask_request: Any) -> Any:
        found, agent = flask_request.authorization, flask_request.user_agent
        credentials = None if found is None else [found.type, found.username, found.password, found.token]
        return [flask_request.content_length, agent.string, agent.browser, credentials, flask_request.endpoint]

    with backend(told, FLASK) as url:
        agent = {"user-agent": "me/1"}
        assert requests.post(url, data=b"four", auth=("ada", "a:b"), headers=agent).json() == [
            4,
            "me/1",
            None,
            ["basic", "ada", "a:b", None],
            None,
        ]
        bearer = {**agent, "authorization": "Bearer x.y=="}
        assert requests.post(url, data=iter([b"chunk"]), headers=bearer).json() == [
            None,
            "me/1",
            None,
            ["bearer", None, None, "x.y=="],
            None,
        ]
        for unread in ("Basic !", "Basic", "", "Basic caf\xe9"):
            assert requests.get(url, headers={"authorization": unread}).json()[3] is None
        partly = requests.get(url, headers={"authorization": "Digest username=a, realm=, qop"}).json()[3]
        assert partly == ["digest", "a", None, None]
    call = FlaskRequest.of_call(HandleRequest("data", {}, "GET", {"authorization": 'Digest username="a", realm="b,c"'}))
    assert call.authorization is not None
    assert (call.authorization.username, call.authorization["realm"]) == ("a", "b,c")
    assert (call.content_length, call.user_agent, call.endpoint) == (None, "", None)


def upload(content: bytes, filename: str = "n.csv", **headers: str) -> FileStorage:
    return FileStorage(io.BytesIO(content), filename, "up", headers)


def test_a_file_is_read_as_its_stream_is() -> None:
    file = upload(b"one\ntwo\nthree\n")
    assert (file.readline(), file.read(2), file.tell()) == (b"one\n", b"tw", 6)
    assert file.seek(0) == 0
    assert list(file) == [b"one\n", b"two\n", b"three\n"]
    assert file.stream.getvalue() == b"one\ntwo\nthree\n"
    assert copy.copy(file).stream is file.stream
    with pytest.raises(AttributeError, match="no attribute 'fetch'"):
        file.fetch()
    file.close()
    assert file.stream.closed
    spooled = FileStorage(types.SimpleNamespace(_file=io.BytesIO()), "f", "up", {})  # type: ignore[arg-type]
    assert spooled.seekable()


def test_a_file_knows_what_its_part_says() -> None:
    file = upload(b"", **{"content-type": "Text/CSV; charset=utf-8", "content-length": "12"})
    assert (file.content_type, file.mimetype, file.content_length) == ("Text/CSV; charset=utf-8", "text/csv", 12)
    assert (bool(file), repr(file)) == (True, "<FileStorage: 'n.csv' ('Text/CSV; charset=utf-8')>")
    bare = upload(b"", filename="")
    assert (bare.content_type, bare.mimetype, bare.content_length, bool(bare)) == (None, "", 0, False)


def test_a_file_is_saved_under_a_path_or_into_a_file(tmp_path: Path) -> None:
    for where in (tmp_path / "path", str(tmp_path / "text")):
        upload(b"saved").save(where)
        assert Path(where).read_bytes() == b"saved"
    file, into = upload(b"0123456789"), io.BytesIO()
    file.seek(4)
    file.save(into, buffer_size=2)
    assert into.getvalue() == b"456789"


def reads_files(flask_request: Any) -> Any:
    image, *_ = flask_request.files.getlist("img")
    head = image.read(4)
    image.seek(0)
    saved = io.BytesIO()
    image.save(saved)
    return {
        "head": head.decode(),
        "size": len(saved.getvalue()),
        "said": [image.name, image.filename, image.content_type, image.headers["Content-Type"]],
        "sizes": [len(file.read()) for file in flask_request.files.getlist("img")[1:]],
        "stream": flask_request.stream.readline().decode(),
    }


async def reads_files_async(flask_request: Any) -> Any:
    return reads_files(flask_request)


@pytest.mark.parametrize(
    ("function", "kind"), [(reads_files, SyncBackend), (reads_files_async, AsyncBackend)], ids=["sync", "async"]
)
def test_uploaded_files_are_read_without_awaiting(function: Any, kind: type[Backend]) -> None:
    large = b"#PNG" + bytes(3_000_000)  # beyond what is kept in memory
    parts = [("img", ("a.png", large, "image/png")), ("img", ("b.png", b"12", "image/png"))]
    with backend(function, FLASK, kind=kind) as url:
        answer = requests.post(url, files=parts, timeout=30)
        assert answer.status_code == 200, answer.text
        got = answer.json()
    assert (got["head"], got["size"], got["sizes"]) == ("#PNG", len(large), [2])
    assert got["said"] == ["img", "a.png", "image/png", "image/png"]
    assert got["stream"].startswith("--")


def test_a_flask_shaped_request_knows_its_url_in_parts_and_its_stream() -> None:
    def told(flask_request: Any) -> Any:
        r = flask_request
        return [r.scheme, r.is_secure, r.host_url, r.url_root, r.base_url, r.stream.read().decode(), r.data.decode()]

    with backend(told, FLASK) as url:
        got = requests.post(f"{url}/a?b", data=b"body", timeout=30).json()
    assert got == ["http", False, f"{url}/", f"{url}/", f"{url}/a", "body", "body"]
    call = FlaskRequest.of_call(HandleRequest(b"data", {}))
    assert (call.scheme, call.is_secure, call.host_url, call.url_root, call.base_url) == ("", False, "", "", "")
    assert call.stream.read() == b"data"
