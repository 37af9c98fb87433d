"""Tables as strict JSON."""

import json
from typing import Any

import pandas as pd


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """One dict a row; NaN becomes None, so that the JSON is valid everywhere."""
    return json.loads(str(table.to_json(orient="records", double_precision=12)))
