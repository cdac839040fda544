"""The endpoint judge against a real server on this machine."""

import json
import logging
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation import load_judge
from safemerge_callback.evaluation.judges import EndpointJudge, KeywordJudge, check_ready
from safemerge_callback.evaluation.judges.endpoint import KEY


class Server:
    """Answers as `reply(request, attempt) -> (status, body)` says, and remembers what it was sent."""

    def __init__(self):
        self.seen, self.headers, self.paths = [], [], []
        self.reply = lambda asked, attempt: (200, completion("yes" if asked["response"].startswith("no") else "No."))
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked = json.loads(body["messages"][1]["content"])
                with lock:
                    outer.seen.append(body)
                    outer.headers.append(dict(self.headers))
                    outer.paths.append(self.path)
                    attempt = sum(json.loads(b["messages"][1]["content"]) == asked for b in outer.seen)
                status, text, *more = outer.reply(asked, attempt)
                try:
                    self.send_response(status)
                    for name, value in more:
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(text.encode())
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the judge has given up waiting, as it should

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


def completion(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def waits(monkeypatch):
    """How long the judge meant to wait between attempts; it waits for none of it."""
    asked = []
    monkeypatch.setattr("safemerge_callback.evaluation.judges.endpoint.time.sleep", asked.append)
    return asked


def test_verdicts_come_in_the_order_of_the_responses(server):
    responses = ["no way", "sure", "no", "of course", "no thanks", "well"] * 4
    judge = EndpointJudge(server.url, "some-judge", workers=6)
    assert judge.refuse_all([f"p{i}" for i in range(24)], responses) == [r.startswith("no") for r in responses]
    assert judge.refuses("p", "no") is True
    assert set(server.paths) == {"/v1/chat/completions"}
    assert all("Authorization" not in headers for headers in server.headers)
    body = server.seen[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("some-judge", 0, 16)
    assert "refuse" in body["messages"][0]["content"]
    assert judge.refuse_all([], []) == []


def test_a_judge_of_harm_asks_about_harm_and_turns_the_answer_round(server):
    judge = load_judge({"name": f"endpoint:m@{server.url}", "decides": "harm", "body": {"seed": 1, "max_tokens": 4}})
    assert judge.refuse_all(["a", "b"], ["no", "sure"]) == [False, True]
    assert "harm" in server.seen[0]["messages"][0]["content"]
    assert (server.seen[0]["seed"], server.seen[0]["max_tokens"]) == (1, 4)


def test_the_key_comes_from_the_environment_alone_and_stays_out_of_every_message(server, monkeypatch, caplog):
    monkeypatch.setenv(KEY, "sk-very-secret")
    caplog.set_level(logging.DEBUG)
    judge = EndpointJudge(server.url, "m", retries=0)
    assert judge.refuses("a prompt nobody may see", "no, a response nobody may see")
    assert server.headers[0]["Authorization"] == "Bearer sk-very-secret"
    server.reply = lambda asked, attempt: (401, json.dumps({"error": f"bad key, asked {asked}"}))
    with pytest.warns(UserWarning, match="status 401") as caught:
        assert judge.refuse_all(["a prompt nobody may see"], ["x"]) == [None]
    said = caplog.text + "".join(str(w.message) for w in caught) + repr(judge) + repr(vars(judge))
    assert "status 401" in said
    assert "secret" not in said
    assert "nobody may see" not in said


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_fault_that_may_pass_is_asked_again(server, waits, status):
    server.reply = lambda asked, attempt: (status, "") if attempt < 3 else (200, completion("yes"))
    assert EndpointJudge(server.url, "m").refuse_all(["a"], ["b"]) == [True]
    assert (len(server.seen), waits) == (3, [0.5, 1.0])


def test_a_wait_that_the_server_asks_for_is_bounded(server, waits):
    after = iter(["3", "86400", "Wed, 21 Oct 2026 07:28:00 GMT"])
    server.reply = lambda asked, attempt: (429, "", ("Retry-After", next(after)))
    with pytest.warns(UserWarning, match="status 429"):
        assert EndpointJudge(server.url, "m", retries=2).refuse_all(["a"], ["b"]) == [None]
    assert waits == [3.0, 10.0]


def test_a_server_that_fails_on_and_on_leaves_unjudged_and_warns_once(server, waits):
    server.reply = lambda asked, attempt: (500, "") if asked["response"] == "b" else (200, completion("no"))
    judge = EndpointJudge(server.url, "m", retries=1)
    with pytest.warns(UserWarning, match=r"no verdict on 1 of 3 responses \(first: status 500\)"):
        assert judge.refuse_all(["1", "2", "3"], ["a", "b", "c"]) == [False, None, False]
    assert len(server.seen) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert judge.refuse_all(["2"], ["b"]) == [None]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("not json at all", "no chat completion"),
        ("[1, 2]", "no chat completion"),
        (json.dumps({"choices": []}), "no chat completion"),
        (completion("perhaps"), "neither yes nor no"),
        (completion(None), "neither yes nor no"),
        (completion(["yes"]), None),
    ],
)
def test_garbage_is_no_verdict_and_is_not_asked_again(server, text, reason):
    server.reply = lambda asked, attempt: (200, text)
    judge = EndpointJudge(server.url, "m")
    if reason is None:
        assert judge.refuse_all(["a"], ["b"]) == [True]
        return
    with pytest.warns(UserWarning, match=reason):
        assert judge.refuse_all(["a"], ["b"]) == [None]
    assert len(server.seen) == 1


def test_redirects_are_not_followed(server):
    server.reply = lambda asked, attempt: (307, "", ("Location", f"{server.url}/elsewhere"))
    with pytest.warns(UserWarning, match="status 307"):
        assert EndpointJudge(server.url, "m").refuse_all(["a"], ["b"]) == [None]
    assert len(server.seen) == 1


def test_a_server_that_hangs_costs_no_more_than_the_time_given(server):
    released = threading.Event()
    server.reply = lambda asked, attempt: (released.wait(20), (200, completion("yes")))[1]
    start = time.monotonic()
    with pytest.warns(UserWarning, match=r"2 of 2 responses \(first: timed out"):
        assert EndpointJudge(server.url, "m", timeout=0.2, retries=0).refuse_all(["a", "b"], ["c", "d"]) == [None, None]
    patient = EndpointJudge(server.url, "m", timeout=5, retries=9, patience=0.4, workers=1)
    with pytest.warns(UserWarning, match="9 of 9"):
        assert patient.refuse_all(list("abcdefghi"), ["x"] * 9) == [None] * 9
    # A wait that nobody bounds takes 20 s, nine of 5 s take 45.
    assert time.monotonic() - start < 18
    released.set()


def test_no_server_at_all_is_no_verdict(server, waits):
    server.http.shutdown()
    server.http.server_close()
    with pytest.warns(UserWarning, match="Connection refused"):
        assert EndpointJudge(server.url, "m", retries=1).refuse_all(["a"], ["b"]) == [None]
    judge = EndpointJudge(server.url, "m", retries=0)
    with pytest.warns(UserWarning, match="1 of 1"), pytest.raises(RuntimeError, match="'endpoint' came to no verdict"):
        judge.refuses("a", "b")


def test_the_judge_does_not_need_the_hub(server, monkeypatch):
    """A machine that is offline for the Hub may have a judge of its own, and the Hub's client refuses to ask it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert EndpointJudge(server.url, "m").refuse_all(["a", "b"], ["no", "sure"]) == [True, False]


def test_an_answer_cut_short_and_one_without_end_are_no_verdict(server, waits):
    server.reply = lambda asked, attempt: (200, completion("yes"), ("Content-Length", "100000"))
    with pytest.warns(UserWarning, match="first: IncompleteRead"):
        assert EndpointJudge(server.url, "m", retries=0).refuse_all(["a"], ["b"]) == [None]
    server.reply = lambda asked, attempt: (200, completion("yes" + " " * (2 << 20)))
    with pytest.warns(UserWarning, match="no chat completion"):
        assert EndpointJudge(server.url, "m", retries=0).refuse_all(["a"], ["b"]) == [None]


def test_ready_asks_once_and_says_what_is_wrong(server, waits):
    judge = EndpointJudge(server.url, "some-judge")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_ready([judge, KeywordJudge(), judge])
    assert len(server.seen) == 1
    server.reply = lambda asked, attempt: (404, json.dumps({"error": "no such model"}))
    with pytest.raises(ConfigError, match=r"'some-judge' at '127.0.0.1' gives no answer \(status 404\): start"):
        check_ready([judge])
    server.reply = lambda asked, attempt: (200, completion("<think>The response"))
    with pytest.warns(UserWarning, match="neither yes nor no to a first question"):
        check_ready([judge])
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(ConfigError, match=r"gives no answer \(Connection refused\)"):
        check_ready([judge])


@pytest.mark.parametrize(
    ("where", "match"),
    [
        ("", "endpoint takes MODEL@URL after the colon"),
        ("just-a-model", "write endpoint:MODEL@URL"),
        ("@http://localhost:1/v1", "write endpoint:MODEL@URL"),
        ("m@http://", "no http\\(s\\) address"),
        ("m@http://[::1", "no http\\(s\\) address"),
        ("m@https://me:hunter2@host/v1", "holds a password"),
    ],
)
def test_an_endpoint_that_cannot_be_is_refused_before_it_is_asked(where, match):
    with pytest.raises(ConfigError, match=match) as caught:
        load_judge(f"endpoint:{where}")
    if "hunter2" in where:
        assert "hunter2" not in str(caught.value)


def test_a_key_does_not_travel_unencrypted(monkeypatch):
    monkeypatch.setenv(KEY, "sk")
    with pytest.raises(ConfigError, match=r"travel to 'far\.away' unencrypted; use https"):
        EndpointJudge("http://far.away/v1", "m")
    EndpointJudge("https://far.away/v1", "m")
    EndpointJudge("http://localhost:8000/v1", "m")
    monkeypatch.delenv(KEY)
    EndpointJudge("http://far.away/v1", "m")


@pytest.mark.parametrize(
    "option", [{"timeout": 0}, {"retries": -1}, {"workers": 0}, {"patience": 0}, {"max_tokens": 0}]
)
def test_numbers_without_meaning_are_refused(option):
    with pytest.raises(ConfigError, match=f"{next(iter(option))} {next(iter(option.values()))}"):
        EndpointJudge("http://localhost/v1", "m", **option)
