"""A study that is really killed (SIGKILL: nothing can be tidied up) goes on where it was."""

import signal
import subprocess
import sys

from tests.studies.planted import latents_of_interest, planted_crosscoder, planted_pair
from tl_crosscoder.models.corpus import Corpus
from tl_crosscoder.models.drop import Drop
from tl_crosscoder.studies.substitution import substitution

TEXTS = ["one x two x three", "nothing here", "x marks the place", "xx and x and no more"]
AT = 10  # conditions that are finished when the process dies

#: the same study in a process of its own, which kills itself while it is in its eleventh condition
DIES = f"""
import os, signal, sys
from tests.studies.test_killed import study
from tl_crosscoder.studies import substitution_table

real, calls = substitution_table.scores, []

def deadly(*args):
    calls.append(1)
    if len(calls) > {AT}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)

substitution_table.scores = deadly
study(sys.argv[1])
"""


def study(parts=None):
    pair, shift, _ = planted_pair()
    corpus = Corpus.from_texts(TEXTS, pair.tokenizer, context=32, windows=False)
    return substitution(
        planted_crosscoder(pair, shift), pair, corpus, latents_of_interest(), drop=Drop(sinks=None), top=(1,),
        n_specific=4, n_random=2, n_bootstrap=200, max_tokens=40, parts=parts,
    )  # fmt: skip


def finished(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*-*.json")}


def test_substitution_goes_on_after_a_kill_with_what_it_had(tmp_path):
    died = subprocess.run([sys.executable, "-c", DIES, str(tmp_path)], capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    kept = finished(tmp_path)
    assert len(kept) == AT  # each whole: the one under way is lost, and left no half file
    again = study(tmp_path)
    assert again.to_json() == study().to_json()
    assert {path: when for path, when in finished(tmp_path).items() if path in kept} == kept
    assert len(finished(tmp_path)) > AT
