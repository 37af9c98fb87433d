"""A figure as part of a page: only drawing elements, no styles, no scripts, colours from the page's palette."""

import re
from xml.etree import ElementTree

SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
DRAWING = """
svg g path defs clipPath rect use text tspan line circle ellipse polyline polygon title desc linearGradient stop
"""
SHAPING = """
id x y x1 x2 y1 y2 dx dy cx cy r rx ry d points width height viewBox transform opacity offset fill fill-opacity fill-rule stroke
stroke-width stroke-opacity stroke-linecap stroke-linejoin stroke-dasharray stroke-dashoffset stroke-miterlimit font-size
font-weight font-style text-anchor dominant-baseline clip-path clip-rule stop-color stop-opacity data-x data-y
"""
ELEMENTS, ATTRIBUTES = set(DRAWING.split()), set(SHAPING.split())
PALETTE = {
    "#2a6fb0": "base",
    "#d8701c": "tuned",
    "#565656": "ink",
    "#7a7a7a": "axis",
    "#9d9d9d": "soft",
    "#c4c4c4": "faint",
}


def inline(figure: str, prefix: str, label: str) -> str:
    """``figure`` ready to stand in a page: whitelisted, ids under ``prefix``, ``label`` for screen readers.

    Style attributes become presentation attributes, since the page's policy allows no inline styles.
    """
    source = figure[figure.index("<svg") :] if "<svg" in figure else figure
    try:
        root = ElementTree.fromstring(source)
    except ElementTree.ParseError as error:
        raise ValueError(f"the figure of panel {prefix!r} is not SVG: {error}") from error
    if root.tag != SVG + "svg":
        raise ValueError(
            f"the figure of panel {prefix!r} is a <{root.tag}>, wanted <svg> in the SVG namespace"
        )
    drawn = _clean(root, prefix)
    for name in ("width", "height"):
        drawn.attrib.pop(name, None)
    drawn.set("role", "img")
    drawn.set("aria-label", label)
    drawn.set("xmlns", SVG[1:-1])
    return ElementTree.tostring(drawn, encoding="unicode")


def _clean(node: ElementTree.Element, prefix: str) -> ElementTree.Element:
    clean = ElementTree.Element(node.tag.removeprefix(SVG), _attributes(node, prefix))
    clean.text, clean.tail = (text if text and text.strip() else None for text in (node.text, node.tail))
    for child in node:
        if (
            isinstance(child.tag, str)
            and child.tag.startswith(SVG)
            and child.tag.removeprefix(SVG) in ELEMENTS
        ):
            clean.append(_clean(child, prefix))
    return clean


def _attributes(node: ElementTree.Element, prefix: str) -> dict[str, str]:
    found = {name.removeprefix(XLINK): value for name, value in node.attrib.items()}
    for declaration in found.pop("style", "").split(";"):
        name, _, value = declaration.partition(":")
        found |= _font(value) if name.strip() == "font" else {name.strip(): value.strip()}
    kept = {name: value for name, value in found.items() if name in ATTRIBUTES}
    if "id" in kept:
        kept["id"] = f"{prefix}-{kept['id']}"
    if re.fullmatch(r"#[\w-]+", found.get("href", "")):
        kept["href"] = f"#{prefix}-{found['href'][1:]}"
    for name, value in list(kept.items()):
        if "url(" in value:
            local = re.fullmatch(r"url\(#([\w-]+)\)", value.strip())
            kept[name] = f"url(#{prefix}-{local[1]})" if local else "none"
        elif name in ("x", "y", "d", "points", "transform"):
            kept[name] = re.sub(r"(\d+\.\d{2})\d+", r"\1", value)  # a hundredth of a point
        elif value.lower() in PALETTE:
            kept[name] = f"var(--{PALETTE[value.lower()]}, {value})"
    return kept


def _font(value: str) -> dict[str, str]:
    """The parts of matplotlib's ``font: bold 8.5px 'DejaVu Sans'`` that the page keeps."""
    size = re.search(r"([\d.]+)px", value)
    return ({"font-size": size[1]} if size else {}) | (
        {"font-weight": "bold"} if re.search(r"\b(bold|700)\b", value) else {}
    )
