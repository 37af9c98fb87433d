"use strict";
// The table of latents, the brushes on the figures, and the keys of a latent's page.  Text enters the page as text only.

const byId = (id) => document.getElementById(id);
const make = (tag, attributes = {}, text = "") => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  return node;
};

// The same as text.visible in Python: controls, bidirectional and zero-width characters are spelled out.
const INVISIBLE = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]/gu;
const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥")
  .replace(INVISIBLE, (c) => "⟨U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩");

const table = () => {
  const { rows: total, columns, pages } = window.TLC_TABLE;
  const shards = window.TLC_DATA || [];
  const data = columns.map((_, i) => [].concat(...shards.map((shard) => shard[i])));
  const place = new Map(columns.map((column, i) => [column.key, i]));
  const linked = new Set(pages);
  const classes = place.has("class") ? [...new Set(data[place.get("class")])].filter((name) => name !== null).sort() : [];
  const texts = columns.map((column, i) => (column.kind === "text" ? i : -1)).filter((i) => i >= 0);
  const LENGTH = 50;
  const state = { q: "", class: "", sort: "", page: 1 };
  let order = [];

  const shown = (value, column) => {
    if (value === null || value === undefined) return "–";
    if (column.kind === "text") return visible(value);
    if (column.key === "latent") return String(value);
    const digits = column.digits;
    const figures = digits === null ? { maximumSignificantDigits: 3 } : { minimumFractionDigits: digits, maximumFractionDigits: digits };
    return (value * column.scale).toLocaleString("en", figures).replace("-", "−");
  };

  // A query is words that must all hold: name<number, name>number, a latent's number, or text.
  const COMPARE = { "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b, "=": (a, b) => a === b };
  const test = (word) => {
    const parts = /^(\w+)(<=|>=|<|>|=)(.*)$/.exec(word);
    if (parts) {
      const i = place.get(parts[1]), limit = Number(parts[3]);
      if (i === undefined || columns[i].kind !== "number" || parts[3] === "" || Number.isNaN(limit)) return null;
      return (row) => data[i][row] !== null && COMPARE[parts[2]](data[i][row], limit);
    }
    if (/^\d+$/.test(word)) return (row) => data[0][row] === Number(word) || texts.some((i) => (data[i][row] || "").includes(word));
    const lower = word.toLowerCase();
    return (row) => texts.some((i) => (data[i][row] || "").toLowerCase().includes(lower));
  };

  const select = () => {
    const tests = state.q.split(/\s+/).filter(Boolean).map(test);
    byId("query").setAttribute("aria-invalid", String(tests.includes(null)));
    const holds = tests.filter(Boolean);
    const kind = data[place.get("class")];
    order = [];
    for (let row = 0; row < data[0].length; row++)
      if ((!state.class || kind[row] === state.class) && holds.every((hold) => hold(row))) order.push(row);
    const key = state.sort.replace(/^-/, ""), i = place.get(key);
    if (i !== undefined) {
      const sign = state.sort.startsWith("-") ? -1 : 1, values = data[i];
      const after = columns[i].kind === "text" ? (a, b) => (a < b ? -1 : a > b ? 1 : 0) : (a, b) => a - b;
      order.sort((a, b) => {  // what is missing stands last, whichever way; ties keep the report's order
        const x = values[a], y = values[b];
        if (x === null || y === null) return (x === null) - (y === null) || a - b;
        return sign * after(x, y) || a - b;
      });
    }
  };

  const draw = () => {
    const last = Math.max(1, Math.ceil(order.length / LENGTH));
    state.page = Math.min(Math.max(1, state.page), last);
    const start = (state.page - 1) * LENGTH, body = byId("table").tBodies[0];
    body.replaceChildren(...order.slice(start, start + LENGTH).map((row) => {
      const line = make("tr");
      columns.forEach((column, i) => {
        const value = data[i][row], text = shown(value, column);
        const cell = make("td", column.kind === "number" ? { class: "n" } : column.key === "tokens" ? { class: "tokens", title: text } : {});
        if (column.key === "latent" && linked.has(value)) cell.append(make("a", { href: "latents/" + value + ".html" }, text));
        else if (column.key === "class") cell.append(make("span", { class: "class " + (/^(base|tuned)-only$/.test(value) ? value : "plain") }, text));
        else cell.textContent = text;
        line.append(cell);
      });
      return line;
    }));
    for (const head of byId("table").tHead.rows[0].cells) {
      const key = head.dataset.key;
      head.setAttribute("aria-sort", state.sort === key ? "ascending" : state.sort === "-" + key ? "descending" : "none");
    }
    const count = (n) => n.toLocaleString("en");
    byId("status").textContent = order.length === total ? count(total) + " latents" : count(order.length) + " of " + count(total) + " latents";
    byId("page").textContent = "page " + count(state.page) + " of " + count(last);
    byId("first").disabled = byId("previous").disabled = state.page === 1;
    byId("next").disabled = byId("last").disabled = state.page === last;
  };

  const write = () => {
    const parts = Object.entries(state).filter(([name, value]) => value && !(name === "page" && value === 1));
    const hash = parts.map(([name, value]) => name + "=" + encodeURIComponent(value)).join("&");
    history.replaceState(null, "", hash ? "#" + hash : location.pathname + location.search);
  };
  const read = () => {
    if (!location.hash.includes("=")) return;
    const given = new URLSearchParams(location.hash.slice(1));
    Object.assign(state, { q: given.get("q") || "", class: given.get("class") || "", sort: given.get("sort") || "", page: Number(given.get("page")) || 1 });
    if (!classes.includes(state.class)) state.class = "";
    byId("query").value = state.q;
    for (const input of byId("classes").querySelectorAll("input")) input.checked = input.value === state.class;
  };
  const change = (changes) => {
    Object.assign(state, { page: 1 }, changes);
    if (!("page" in changes)) select();
    draw();
    write();
  };

  const head = make("tr");
  for (const column of columns) {
    const cell = make("th", { scope: "col", "data-key": column.key, class: column.kind === "number" ? "n" : "", "aria-sort": "none" });
    const button = make("button", { type: "button", title: column.meaning }, column.label);
    button.addEventListener("click", () => {  // numbers: largest first, then smallest, then the report's own order
      const turns = column.kind === "number" ? ["-" + column.key, column.key, ""] : [column.key, "-" + column.key, ""];
      change({ sort: turns[(turns.indexOf(state.sort) + 1) % 3] || "" });
    });
    cell.append(button);
    head.append(cell);
  }
  byId("table").tHead.replaceChildren(head);
  byId("table").setAttribute("aria-rowcount", String(total));
  if (classes.length) {
    for (const name of ["", ...classes]) {
      const label = make("label", { class: "choice" }), input = make("input", { type: "radio", name: "class", value: name });
      input.checked = name === state.class;
      input.addEventListener("change", () => change({ class: name }));
      label.append(input, make("span", {}, name || "all"));
      byId("classes").append(label);
    }
  } else byId("classes").hidden = true;
  byId("query").addEventListener("input", (event) => {
    for (const box of document.querySelectorAll(".brush")) box.remove();
    change({ q: event.target.value });
  });
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("first").addEventListener("click", () => change({ page: 1 }));
  byId("previous").addEventListener("click", () => change({ page: state.page - 1 }));
  byId("next").addEventListener("click", () => change({ page: state.page + 1 }));
  byId("last").addEventListener("click", () => change({ page: Infinity }));
  byId("controls").hidden = byId("pager").hidden = false;
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !/^(input|textarea)$/i.test(event.target.tagName)) { event.preventDefault(); byId("query").focus(); }
  });
  const load = () => { read(); select(); draw(); };
  window.addEventListener("hashchange", load);
  load();

  // Replace what the query says about these columns by what was brushed.
  return (ranges) => {
    const others = state.q.split(/\s+/).filter((word) => word && !ranges.some(([name]) => new RegExp("^" + name + "[<>=]").test(word)));
    const limits = ranges.flatMap(([name, low, high]) => (low === null ? [] : [name + ">" + low, name + "<" + high]));
    byId("query").value = [...others, ...limits].join(" ");
    change({ q: byId("query").value });
  };
};

// Dragging across a figure whose axes are columns of the table selects those latents; a click clears the selection.
const brush = (svg, choose) => {
  const axes = ["x", "y"].filter((way) => svg.dataset[way]).map((way) => {
    const [name, ...numbers] = svg.dataset[way].split(" ");
    return { way, name, numbers: numbers.map(Number) };
  });
  const box = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  box.setAttribute("class", "brush");
  const at = (event) => new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  const within = (value, [start, stop]) => Math.min(Math.max(value, Math.min(start, stop)), Math.max(start, stop));
  let from = null;
  const frame = (to) => {
    const sides = { x: [0, svg.viewBox.baseVal.width], y: [0, svg.viewBox.baseVal.height] };
    for (const { way, numbers } of axes) sides[way] = [from[way], to[way]].map((value) => within(value, numbers)).sort((a, b) => a - b);
    return sides;
  };
  svg.addEventListener("pointerdown", (event) => { from = at(event); svg.setPointerCapture(event.pointerId); });
  svg.addEventListener("pointermove", (event) => {
    if (!from) return;
    const { x, y } = frame(at(event));
    for (const [name, value] of Object.entries({ x: x[0], y: y[0], width: x[1] - x[0], height: y[1] - y[0] })) box.setAttribute(name, value);
    svg.append(box);
  });
  svg.addEventListener("pointerup", (event) => {
    const to = at(event), sides = frame(to), moved = Math.hypot(to.x - from.x, to.y - from.y) > 4;
    from = null;
    if (!moved) box.remove();
    choose(axes.map(({ way, name, numbers: [start, stop, low, high] }) => {
      const value = (place) => low + ((place - start) / (stop - start)) * (high - low);
      const ends = sides[way].map(value).sort((a, b) => a - b).map((end) => end.toFixed(3));
      return moved ? [name, ...ends] : [name, null, null];
    }));
    if (moved) byId("latents").scrollIntoView({ behavior: "smooth" });
  });
  svg.addEventListener("pointercancel", () => { from = null; box.remove(); });
};

// In an example the pointer or the arrow keys name one token; it is framed in both columns and its numbers are written below.
const example = (article) => {
  const columns = [...article.querySelectorAll(".tokens")].map((column) => [...column.querySelectorAll("mark")]);
  const readout = article.querySelector(".readout"), length = columns[0].length;
  let here = -1;
  const go = (place) => {
    for (const column of columns) {
      if (column[here]) column[here].classList.remove("here");
      if (column[place]) column[place].classList.add("here");
    }
    here = place;
    readout.textContent = length && columns[0][place] ? "“" + columns[0][place].textContent.trim() + "” " + columns[0][place].title : "";
  };
  columns.forEach((column) => column.forEach((mark, place) => mark.addEventListener("pointerenter", () => go(place))));
  article.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !length) return;
    event.preventDefault();
    go(here < 0 ? (step > 0 ? 0 : length - 1) : (here + step + length) % length);
  });
};

const copy = (button, source) => {
  button.hidden = false;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(source.textContent);
    } catch {
      getSelection().selectAllChildren(source);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy as Python"; }, 1500);
  });
};

if (byId("table")) {
  const choose = table();
  for (const svg of document.querySelectorAll("figure svg[data-x]")) brush(svg, choose);
}
if (byId("copy")) {
  copy(byId("copy"), byId("python"));
  for (const article of document.querySelectorAll(".example")) example(article);
  document.addEventListener("keydown", (event) => {
    const way = { n: "next", p: "prev" }[event.key];
    const link = way && !event.ctrlKey && !event.metaKey && !event.altKey && document.querySelector('a[rel="' + way + '"]');
    if (link) link.click();
  });
}
