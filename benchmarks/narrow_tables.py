"""The tables of docs/narrow.md, out of the rows that narrow.py has written so far.

    python benchmarks/narrow_tables.py [tiny smollm2-false-fact smollm2-taboo] [--blind] [--markdown] [--rows runs/narrow.jsonl]

Mean ± half of the 95 % t interval over seeds; of two seeds both values.
"""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
from narrow import PAIRS, finished
from narrow_steering import QUESTIONS
from narrow_variants import VARIANTS
from variants import markdown, mean_and_interval

RANKINGS = {
    "delta_norm": "norm",
    "latent scaling": "ν",
    "difference_share": "share",
    "difference_peak": "peak",
    "rank_score": "score",
}
DICTIONARY = {
    "l0": "L0",
    "fve": "FVE",
    "fve_difference": "FVE of difference",
    "dead": "dead",
    "largest_delta_norm": "largest Δnorm",
}
RATES = {
    "undo top 3": "undo 3",
    "undo top 10": "undo 10",
    "undo top 30": "undo 30",
    "undo matched random": "undo random 30",
    "remove top 30": "remove 30",
    "remove matched random": "remove random 30",
}
#: What counts as success: that it is shown, or that it is gone, in a coherent answer.
GOALS = {"raise": "rate", "induce": "rate", "mitigate": "gone"}


def behaviours(row: dict[str, Any]) -> list[str]:
    return [name for name, value in row.items() if name != "settings" and isinstance(value, dict | list)]


def dictionaries(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a cell: how good the dictionary is."""
    return pd.DataFrame(
        [{"variant": r["variant"]} | {title: r[name] for name, title in DICTIONARY.items()} for r in rows]
    )


def found(rows: list[dict[str, Any]], behaviour: str) -> pd.DataFrame:
    """How many latents fire on the behaviour in all, among the top 3 and 20 of each ranking, and where the first one stands."""
    cells = []
    for row in rows:
        mine = row[behaviour]
        cell = {"variant": row["variant"], "fire on it": mine["fire"]}
        for ranking, title in RANKINGS.items():
            place = mine["found"].get(ranking) or {}
            cell |= {f"{title}: of 3": place.get("top 3"), f"{title}: of 20": place.get("top 20")}
            cell |= {f"{title}: first": place.get("first")}
        cells.append(cell)
    return pd.DataFrame(cells)


def carried(rows: list[dict[str, Any]], behaviour: str) -> pd.DataFrame:
    """What is left of the behaviour without the top latents, and the share of the KL that they win back."""
    cells = []
    for row in rows:
        mine, kl = row[behaviour], row[behaviour]["recovered"]
        drawn = [value for name, value in kl.items() if name.startswith("random")]
        cell = {"variant": row["variant"]} | {title: mine["rates"].get(name) for name, title in RATES.items()}
        ranking = row["settings"]["ranking"]
        cell |= {f"KL {n}": kl.get(f"{ranking} {n}") for n in (3, 10, 30)}
        cell |= {"KL norm 30": kl.get("delta_norm 30"), "KL ν 30": kl.get("latent scaling 30")}
        cells.append(cell | {"KL random 30": sum(drawn) / len(drawn) if drawn else None, "KL all": kl["all"]})
    return pd.DataFrame(cells)


def steered(rows: list[dict[str, Any]], behaviour: str) -> pd.DataFrame:
    """The best over strengths of each direction, of the better random latent, and without steering."""
    cells = []
    for row in rows:
        tries, cell = pd.DataFrame(row[behaviour]), {"variant": row["variant"]}
        for question in QUESTIONS:
            mine = tries[tries["question"] == question]
            best = mine.groupby("direction")[GOALS[question]].max()
            cell |= {
                f"{question}: nothing": best["nothing"],
                f"{question}: difference": best["difference"],
                f"{question}: tuned": best["tuned"],
                f"{question}: random": best[best.index.str.startswith("random")].max(),
            }
        cells.append(cell)
    return pd.DataFrame(cells)


def over_seeds(cells: pd.DataFrame) -> pd.DataFrame:
    """One row a variant, in the order of the benchmark."""
    groups: Any = cells.groupby("variant")
    names = [name for name in VARIANTS if name in groups.groups]
    summary = pd.DataFrame(
        {column: groups[column].agg(mean_and_interval) for column in cells if column != "variant"}
    )
    summary.insert(0, "seeds", groups.size())
    return summary.reindex(names)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", nargs="*", default=list(PAIRS), metavar="PAIR")
    parser.add_argument("--blind", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--rows", type=Path, default=Path("runs/narrow.jsonl"))
    options = parser.parse_args()
    for pair in options.pairs:
        mine = [r for r in finished(options.rows) if r["pair"] == pair and r["blind"] == options.blind]
        marked, pushed = ([r for r in mine if r["what"] == what] for what in ("marks", "steering"))
        if not marked:
            print(f"\n{pair}: nothing yet")
            continue
        names = behaviours(marked[0])
        tables = {f"{pair}, the dictionaries": dictionaries(marked)}
        tables |= {f"{pair}, {name}: found": found(marked, name) for name in names}
        tables |= {f"{pair}, {name}: carried": carried(marked, name) for name in names}
        tables |= {f"{pair}, {name}: steered": steered(pushed, name) for name in names if pushed}
        for title, cells in tables.items():
            summary = over_seeds(cells)
            with pd.option_context("display.width", 300, "display.max_columns", None):
                print(f"\n### {title}\n\n{markdown(summary) if options.markdown else summary.to_string()}")


if __name__ == "__main__":
    main()
