"""Every variant at equal L0: what it finds of a planted difference, and what it takes for a difference.

    python benchmarks/variants.py planted wide rare tiny [--seeds 5] [--out runs/variants.jsonl] [--only TEXT]

``planted`` and ``wide``: a synthetic pair of 116 concepts; ``rare``: 120 shared concepts and six rare tuned-only ones;
``planted-long`` and ``rare-long``: some of their variants, trained three times as long; ``tiny``: the tiny language-model pair,
captured once beside the results.  Each cell is appended to ``--out`` as it is done and is not done again; a cell of other settings
is.  ``--seeds 0`` prints what there is, ``--against NAME`` the differences to a variant, ``--markdown`` a table for docs/.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from tiny_variants import RANKINGS, TINY, TRAINING, tiny_cell
from variant_cells import cell
from variant_grid import STUDIES

GATES = {"norm": "Δnorm", "gated": "Δnorm and ν", "nu": "ν alone"}
CALLS = {
    f"{gate}_{what}": f"{what}, {name}" for gate, name in GATES.items() for what in ("precision", "recall")
}
HEAD = {"weight": "weight", "l0": "L0", "fve": "FVE", "fve_difference": "FVE of difference", "dead": "dead"}
PLANTED_COLUMNS = HEAD | CALLS | {"found": "found", "mcc": "MCC", "mirror_pairs": "mirror pairs"}
RARE_COLUMNS = HEAD | {"found_tuned": "rare found", "mcc_tuned": "rare MCC", "found": "all found"} | CALLS
TINY_COLUMNS = {name: title for name, title in HEAD.items() if name != "weight"} | {
    "largest_delta_norm": "largest Δnorm",
    **{
        f"{behaviour}, {ranking} {n}": f"{behaviour}, top {n} by {ranking.removeprefix('difference_')}"
        for behaviour in ("moon", "password")
        for ranking in RANKINGS
        for n in (10, 30)
    },
}
COLUMNS = {name: RARE_COLUMNS if name.startswith("rare") else PLANTED_COLUMNS for name in STUDIES} | {
    "tiny": TINY_COLUMNS
}


def settings_of(study: str, variant: str) -> dict[str, Any]:
    """What a cell depends on beside its seed; other settings make it another cell."""
    if study == "tiny":
        return asdict(TRAINING)
    setting = replace(STUDIES[study], **STUDIES[study].variants[variant].changes)
    return asdict(replace(setting, variants={}))


def cells(study: str, seeds: int, only: str) -> Iterator[tuple[str, int]]:
    variants = TINY if study == "tiny" else STUDIES[study].variants
    return ((variant, seed) for seed in range(seeds) for variant in variants if only in variant)


def finished(out: Path) -> list[dict[str, Any]]:
    """The rows of the file; a last line that was not written to its end is cut off."""
    if not out.exists():
        return []
    whole = out.read_bytes().rpartition(b"\n")
    if whole[2]:
        out.write_bytes(whole[0] + whole[1])
    rows = [json.loads(line) for line in whole[0].splitlines() if line]
    current = [(row, settings_of(row["study"], row["variant"])) for row in rows if known(row)]
    return [row for row, settings in current if row["settings"] == json.loads(json.dumps(settings))]


def known(row: dict[str, Any]) -> bool:
    variants = TINY if row["study"] == "tiny" else STUDIES[row["study"]].variants
    return row["variant"] in variants


def run(studies: Iterable[str], seeds: int, out: Path, only: str = "") -> None:
    """Do what is not done yet."""
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = finished(out)
    done = {(row["study"], row["variant"], row["seed"]) for row in rows}
    for study in studies:
        for variant, seed in cells(study, seeds, only):
            if (study, variant, seed) in done:
                continue
            if study == "tiny":
                marks = tiny_cell(variant, seed, out.parent / "variants-tiny" / "acts")
            else:
                # where the weight was found with other seeds
                weights = [
                    row["weight"] for row in rows if (row["study"], row["variant"]) == (study, variant)
                ]
                weight = None if not weights or weights[0] is None else float(np.median(weights))
                marks = cell(STUDIES[study], STUDIES[study].variants[variant], seed, weight)
            rows.append(
                {"study": study, "variant": variant, "settings": settings_of(study, variant), **marks}
            )
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(f"{study}: {variant}, seed {seed}: {marks['seconds']} s, L0 {marks['l0']:.2f}", flush=True)


def mean_and_interval(values: pd.Series) -> str:
    """The mean and half the 95 % interval by Student's t over seeds; of two seeds both values.

    A seed where it is undefined is left out, and said.
    """
    known = values.astype(float).dropna()
    if known.empty:
        return "-"
    if len(values) == 2 and len(known) == 2:
        return " / ".join(map(number, known))
    text = number(known.mean())
    if len(known) > 1 and float(np.ptp(known)) > 0:
        text += f" ± {number(stats.t.ppf(0.975, len(known) - 1) * known.std() / len(known) ** 0.5)}"
    return text + (f" ({len(known)} of {len(values)})" if len(known) < len(values) else "")


def number(x: float) -> str:
    """Two decimals, fewer where that is plenty, and no leading 0."""
    text = f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"
    return text.replace("0.", ".", 1).removeprefix("-" if not float(text) else "") if abs(x) < 1 else text


def table(rows: list[dict[str, Any]], study: str, against: str | None = None) -> pd.DataFrame:
    """One row a variant: mean and interval of each figure, or of its difference to the variant ``against`` with the same seed."""
    frame = pd.DataFrame([row for row in rows if row["study"] == study])
    order = list(TINY if study == "tiny" else STUDIES[study].variants)
    if frame.empty:
        return frame
    columns = {name: title for name, title in COLUMNS[study].items() if name in frame}
    if against is not None:
        frame = differences(frame, list(columns), against)
    groups: Any = frame.groupby("variant")
    result = pd.DataFrame(
        {title: groups[name].agg(mean_and_interval) for name, title in columns.items()}
    ).reindex([name for name in order if name in groups.groups])
    result.insert(0, "seeds", groups.size())
    if "weight" in result:
        result["weight"] = (
            groups["weight"].median().map(lambda weight: "-" if pd.isna(weight) else f"{weight:.2g}")
        )
    return result


def differences(frame: pd.DataFrame, columns: list[str], against: str) -> pd.DataFrame:
    """The rows less the reference's row of the same seed; seeds without one are left out."""
    reference = frame.loc[frame["variant"] == against].set_index("seed")[columns].astype(float)
    if reference.empty:
        raise SystemExit(f"no finished cell of a variant named {against!r}")
    paired = frame.loc[frame["seed"].isin(list(reference.index)) & (frame["variant"] != against)].copy()
    paired[columns] = paired[columns].astype(float) - reference.loc[paired["seed"]].to_numpy()
    return paired


def markdown(frame: pd.DataFrame) -> str:
    lines = [["variant", *frame.columns], ["---"] * (1 + len(frame.columns))]
    lines += [[str(name), *map(str, row)] for name, row in zip(frame.index, frame.to_numpy(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="+", choices=[*STUDIES, "tiny"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/variants.jsonl"))
    parser.add_argument("--only", default="", help="variants whose name has this in it")
    parser.add_argument("--against", help="show differences to this variant, seed by seed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run(options.studies, options.seeds, options.out, options.only)
    rows = finished(options.out)
    for study in options.studies:
        frame = table(rows, study, options.against)
        seconds = sum(row["seconds"] for row in rows if row["study"] == study)
        trainings = sum(row.get("trainings", 1) for row in rows if row["study"] == study)
        print(f"\n{study}: {trainings} trainings, {seconds / 60:.0f} minutes of processor time\n")
        with pd.option_context("display.width", 400, "display.max_columns", None):
            print(markdown(frame) if options.markdown else frame.to_string())


if __name__ == "__main__":
    main()
