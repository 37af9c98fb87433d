"""The tables of docs/narrow.md, out of the rows that narrow.py has written so far.

    python benchmarks/narrow_tables.py [tiny smollm2-false-fact smollm2-taboo] [--blind] [--long] [--markdown]

Means over seeds, of each behaviour.  ``--long``: more columns, with half of the 95 % t interval; of two seeds both values.
"""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
from narrow import PAIRS, finished
from narrow_steering import QUESTIONS
from narrow_variants import VARIANTS
from variants import markdown, mean_and_interval, number

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


#: Columns of the short tables, by the long ones' names; where the ranking that the pair is undone by stands as "best".
SHORT = {
    "dictionary": ["L0", "FVE", "FVE of difference", "dead", "largest Δnorm"],
    "found": ["fire on it", "norm: of 3", "ν: of 3", "best: of 3", "norm: of 20", "ν: of 20", "best: of 20"],
    "carried": [
        *("undo 3", "undo 10", "undo 30", "undo random 30", "remove random 30"),
        *("KL 10", "KL 30", "KL norm 30", "KL ν 30", "KL random 30"),
    ],
}


def short(tables: list[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    """Means over seeds, the behaviours' one after the other."""
    means = [cells.groupby("variant")[columns].mean() for cells in tables]
    joined = {
        column: [" / ".join(_number(m.loc[v, column]) for m in means) for v in means[0].index]
        for column in columns
    }
    summary = pd.DataFrame(joined, index=means[0].index)
    summary.insert(0, "seeds", tables[0].groupby("variant").size())
    return summary.reindex([name for name in VARIANTS if name in summary.index])


def _number(value: float) -> str:
    if pd.isna(value):
        return "-"
    return str(round(value)) if abs(value - round(value)) < 0.005 else number(float(value))


def with_best(cells: pd.DataFrame, ranking: str) -> pd.DataFrame:
    return cells.assign(**{f"best: of {n}": cells[f"{RANKINGS[ranking]}: of {n}"] for n in (3, 20)})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", nargs="*", default=list(PAIRS), metavar="PAIR")
    parser.add_argument("--blind", action="store_true")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--rows", type=Path, default=Path("runs/narrow.jsonl"))
    options = parser.parse_args()
    for pair in options.pairs:
        mine = [r for r in finished(options.rows) if r["pair"] == pair and r["blind"] == options.blind]
        marked, pushed = ([r for r in mine if r["what"] == what] for what in ("marks", "steering"))
        if not marked:
            print(f"\n{pair}: nothing yet")
            continue
        names, ranking = behaviours(marked[0]), marked[0]["settings"]["ranking"]
        parts = {
            "dictionary": [dictionaries(marked).apply(_numeric)],
            "found": [with_best(found(marked, name), ranking).apply(_numeric) for name in names],
            "carried": [carried(marked, name).apply(_numeric) for name in names],
            "steered": [steered(pushed, name) for name in names] if pushed else [],
        }
        titles = f"{pair}, {' / '.join(names)}"
        if options.long:
            shown = {
                f"{pair}, {name}: {part}": over_seeds(cells)
                for part, tables in parts.items()
                for name, cells in zip(names, tables, strict=False)
            }
        else:
            shown = {
                f"{titles}: {part}": short(
                    tables, SHORT.get(part) or [c for c in tables[0] if c != "variant"]
                )
                for part, tables in parts.items()
                if tables
            }
        for title, summary in shown.items():
            with pd.option_context("display.width", 300, "display.max_columns", None):
                print(f"\n### {title}\n\n{markdown(summary) if options.markdown else summary.to_string()}")


def _numeric(column: pd.Series) -> pd.Series:
    return column if column.name == "variant" else pd.to_numeric(column)


if __name__ == "__main__":
    main()
