import math

import numpy as np
import pandas as pd
import pytest

from tests.studies.readout import readout_pair, readout_store
from tl_crosscoder.dictionary.crosscoder import Crosscoder
from tl_crosscoder.dictionary.init import Init
from tl_crosscoder.dictionary.partition import Partition
from tl_crosscoder.dictionary.sparsity import ReLU
from tl_crosscoder.studies.gate_audit.gates import Gate, count_table, measured
from tl_crosscoder.studies.statistics import poisson_interval


def table(values, n_fired=1000.0):
    rows = {"gate": values, "n_fired": n_fired, "frequency": np.asarray(n_fired) / 10_000}
    return pd.DataFrame(rows, index=pd.RangeIndex(len(values), name="latent"))


def test_a_latent_passes_above_the_threshold_where_it_fires_often_enough():
    gate = Gate(threshold=0.8, least=100)
    here = table([0.9, 0.81, 0.8, math.nan, 0.95, 0.99], [1000.0, 1000.0, 1000.0, 1000.0, 99.0, 100.0])
    assert gate.passing(here) == [5, 0, 1]  # the most specific first
    assert gate.passing(here, 0.85) == [5, 0]
    assert gate.alive(here) == [0, 1, 2, 3, 5]
    assert Gate(threshold=0.8, least=1, rarest=0.05).alive(here) == [0, 1, 2, 3]


def test_counts_are_pooled_over_seeds_with_their_intervals_and_ratios():
    tables = {
        "target": [table([0.9, 0.9, 0.1]), table([0.9, 0.1, 0.1])],
        "noise": [table([0.1, 0.1, 0.1])] * 2,
        "disjoint": [table([0.9, 0.9, 0.9])] * 2,
    }
    counts = count_table(tables, Gate()).set_index(["arm", "threshold"])
    row = counts.loc[("target", 5 / 6)]
    low, high = poisson_interval(3)
    assert (row["counts"], row["mean"], row["low"], row["high"]) == ("2 1", 1.5, low / 2, high / 2)
    assert counts.loc[("disjoint", 5 / 6), "ratio"] == 2 and counts.loc[("noise", 5 / 6), "ratio"] == 0
    assert counts.loc[("target", 0.95), "mean"] == 0 and math.isnan(counts.loc[("noise", 0.95), "ratio"])


def test_latents_that_belong_to_base_for_good_pass_no_gate():
    made = Crosscoder(16, 12, ReLU(), partition=Partition(base=4, tuned=4), init=Init(norm=1.0))
    store = readout_store(readout_pair(heard=True))
    for by in ("specificity", "delta_norm", "peak"):
        gate = Gate(by, threshold=0.01, least=1)
        passing = gate.passing(measured(made, store, gate, 2000))
        assert not set(passing) & set(range(4)) and set(passing) & set(range(4, 8))


def test_a_gate_has_its_own_threshold_and_counts_are_given_for_any():
    assert Gate().threshold == 5 / 6 and Gate("peak").threshold == 0.5
    assert 0.77 in Gate("delta_norm", 0.77).sweep
    with pytest.raises(KeyError, match="known: specificity"):
        Gate("nu")
