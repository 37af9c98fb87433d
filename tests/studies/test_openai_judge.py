"""A language model as judge, against a local stand-in of the endpoint."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tl_crosscoder.errors import JudgeFailed
from tl_crosscoder.studies.judge import Claim, Explainer, Judge, Passage
from tl_crosscoder.studies.openai_judge import OpenAIJudge

CLAIM = Claim("The text is about cheese.")
KEY = "sk-never-to-be-seen"


@contextmanager
def endpoint(answer):
    """A server; ``answer(question, n)``, of the n-th request, is what the model says, or a status and headers, or raw bytes."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
            said = answer(body["messages"][-1]["content"], len(seen))
            status, headers = said if isinstance(said, tuple) else (200, {})
            text = said if isinstance(said, str) else None
            content = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            content = said if isinstance(said, bytes) else content
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def _loopback(socket_enabled, monkeypatch):  # noqa: ARG001
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("tl_crosscoder.studies.openai_judge.time.sleep", lambda _: None)
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)


def judged(url, texts, **options):
    return OpenAIJudge("m", url, at_once=1, **options).holds(CLAIM, [Passage((t,)) for t in texts])


def about_brie(question, _n):
    return "Yes." if "brie" in question else " no\n"


def test_each_text_gets_its_own_verdict_in_order():
    with endpoint(about_brie) as (url, seen):
        texts = [Passage((t,)) for t in ("a", "brie", "b", "brie!")]
        verdicts = OpenAIJudge("m", url, at_once=3).holds(CLAIM, texts)
    assert [v.holds for v in verdicts] == [False, True, False, True]
    assert {s["path"] for s in seen} == {"/v1/chat/completions"} and {s["model"] for s in seen} == {"m"}
    assert all(s["temperature"] == 0 for s in seen)


def test_the_question_that_was_asked_and_the_claim_reach_the_model():
    with endpoint(about_brie) as (url, seen):
        OpenAIJudge("m", url).holds(CLAIM, [Passage(("the answer",), asked="the question")])
    said = seen[0]["messages"][-1]["content"]
    assert all(part in said for part in ("the question", "the answer", CLAIM.text))


def test_nonsense_is_asked_again_then_kept_apart_and_the_rest_stands():
    with endpoint(lambda q, _: "Perhaps, who knows?" if "odd" in q else "yes") as (url, seen):
        verdicts = judged(url, ["odd", "plain"], attempts=3)
    assert verdicts[0].holds is None and verdicts[0].said == "Perhaps, who knows?"
    assert verdicts[1].holds is True
    assert len(seen) == 3 + 1


def test_an_answer_that_says_yes_and_no_is_nonsense_and_thoughts_are_not_read():
    with endpoint(lambda q, _: "yes and no" if "both" in q else "<think>no, no</think>\nYes") as (url, _):
        both, thought = judged(url, ["both", "x"])
    assert both.holds is None and thought.holds is True


@pytest.mark.parametrize(
    "trouble", [(503, {}), (429, {"Retry-After": "1"}), b"not json", b'{"error": 1}', None]
)
def test_a_server_in_trouble_is_asked_again(trouble):
    with endpoint(lambda _q, n: trouble if n < 3 else "yes") as (url, seen):
        [verdict] = judged(url, ["a"], attempts=3)
    assert verdict.holds is True and len(seen) == 3


def test_a_text_without_any_answer_does_not_stop_the_others():
    with endpoint(lambda q, _: (500, {}) if "odd" in q else "no") as (url, seen):
        verdicts = judged(url, ["a", "odd", "b"], attempts=2)
    assert [v.holds for v in verdicts] == [False, None, False] and verdicts[1].said == "HTTP 500"
    assert len(seen) == 1 + 2 + 1


def test_an_endpoint_that_answers_nothing_is_an_error_after_bounded_attempts():
    said = "no answer from the judge 'm' on any of 2 texts, 2 attempts each: HTTP 500"
    with endpoint(lambda *_: (500, {})) as (url, seen):
        with pytest.raises(JudgeFailed, match=said):
            judged(url, ["a", "b"], attempts=2)
        assert len(seen) == 4
    with pytest.raises(JudgeFailed, match="URLError"):
        judged(url, ["a"], attempts=1)  # nobody listens there any more


@pytest.mark.parametrize("status", [400, 401, 404, 302])
def test_a_refusal_stops_at_once_and_says_what_to_look_at(status):
    with (
        endpoint(lambda *_: (status, {"Location": "http://127.0.0.1:9/elsewhere"})) as (url, seen),
        pytest.raises(JudgeFailed, match=f"HTTP {status}") as caught,
    ):
        judged(url, ["a"])
    assert len(seen) == 1  # a redirect is not followed: the key would go with it
    assert KEY not in str(caught.value)
    assert status != 401 or "OPENAI_API_KEY is set" in str(caught.value)


def test_the_key_goes_to_the_endpoint_and_nowhere_else(monkeypatch):
    with endpoint(about_brie) as (url, seen):
        judge = OpenAIJudge("m", url)
        judge.holds(CLAIM, [Passage(("a",))])
        monkeypatch.delenv("OPENAI_API_KEY")
        judge.holds(CLAIM, [Passage(("a",))])
    assert [s["key"] for s in seen] == [f"Bearer {KEY}", None]
    assert KEY not in repr(judge) + repr(vars(judge)) + judge.name


def test_a_description_is_one_sentence_of_the_marked_examples():
    examples = [Passage(("the", " moon"), (0.0, 2.0))]
    with endpoint(lambda *_: "  Words for\nthe moon. ") as (url, seen):
        claim = OpenAIJudge("m", url).describe(examples)
    assert claim == Claim("Words for the moon.")
    assert "the« moon»" in seen[0]["messages"][-1]["content"]
    with endpoint(lambda *_: "") as (url, seen):
        assert OpenAIJudge("m", url, attempts=2).describe(examples) is None
    assert len(seen) == 2


def test_the_address_comes_from_the_environment_and_must_be_one(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:1234/v1/")
    assert OpenAIJudge("m").url == "http://localhost:1234/v1/chat/completions"
    for bad in ("localhost:8000", "ftp://a/b", "https://user:secret@host/v1", "http://host/v1?key=secret"):
        with pytest.raises(ValueError, match="base_url") as caught:
            OpenAIJudge("m", bad)
        assert "secret" not in str(caught.value)
    assert isinstance(OpenAIJudge("m"), Judge) and isinstance(OpenAIJudge("m"), Explainer)
