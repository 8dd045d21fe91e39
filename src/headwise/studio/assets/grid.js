// Layer x head, a cell a head, coloured by the chosen question. One tab stop: arrows move, Enter selects.
import { pointer, select } from "./vendor/d3.js";
import { number, placeKey } from "./data.js";
import { MIXED, roleLook, scoreScale } from "./colour.js";
import { onWidth, uniqueId } from "./parts.js";
import { cellAt, gridShape, naturalWidth, step } from "./gridshape.js";

export function gridView(parent, data, store, theme, tip, say) {
  const box = select(parent).append("div").attr("class", "grids").style("--least", `${naturalWidth(data.streams)}px`);
  for (const stream of data.streams) streamGrid(box, stream, data, store, theme, tip, say);
}

function streamGrid(parent, stream, data, store, theme, tip, say) {
  const figure = parent.append("figure").attr("class", "grid");
  if (data.streams.length > 1) figure.append("figcaption").text(stream.name);
  const svg = figure.append("svg");
  const hatch = uniqueId("hatch");
  const pattern = svg.append("defs").append("pattern").attr("id", hatch).attr("class", "hatch").attr("width", 5).attr("height", 5).attr("patternUnits", "userSpaceOnUse").attr("patternTransform", "rotate(45)");
  pattern.append("rect").attr("width", 5).attr("height", 5);
  pattern.append("line").attr("y2", 5);
  const axes = svg.append("g").attr("class", "axes").attr("aria-hidden", "true");
  const cells = svg.append("g").attr("class", "cells").attr("role", "grid").attr("aria-label", `Heads of ${stream.name}: arrows move, Enter selects`).attr("aria-readonly", "true");
  const marks = svg.append("g").attr("class", "marks").attr("aria-hidden", "true");
  const rings = svg.append("g").attr("class", "rings").attr("aria-hidden", "true");
  let shape = null;
  let rects = null;
  let cursor = { layer: 0, head: 0 };

  const place = (at) => data.places.get(placeKey(stream.name, at.layer, at.head));
  const node = (at) => rects.nodes()[at.layer * stream.heads + at.head];
  const question = () => data.questions.get(store.get().question);

  function words(at) {
    const found = place(at);
    if (!found) return [`layer ${stream.layers[at.layer]}, head ${at.head}`, "no such head"];
    const asked = question();
    const score = data.score(asked, found);
    const sem = data.sem(asked, found);
    const { ranks, order } = data.ranking(asked);
    const lines = [data.label(found)];
    if (score === null) lines.push("not measured");
    else lines.push(`${number(score)}${sem === null ? "" : ` ± ${number(sem)}`} ${asked.unit}`, `rank ${ranks.get(found.key)} of ${order.length}`);
    if (data.role(found)) lines.push(data.role(found));
    return lines;
  }

  function build(width) {
    const focused = svg.node().contains(document.activeElement);
    shape = gridShape(stream, width);
    svg.attr("width", shape.width).attr("height", shape.height);
    drawAxes(axes, shape);
    const rows = cells.attr("aria-rowcount", shape.rows.length).attr("aria-colcount", shape.columns.length)
      .selectAll("g").data(shape.rows).join("g").attr("role", "row").attr("aria-rowindex", (_, i) => i + 1);
    rows.selectAll("rect").data((row) => shape.cells(row)).join("rect")
      .attr("role", "gridcell").attr("class", "cell").attr("aria-colindex", (_, i) => i + 1)
      .attr("data-layer", (c) => c.layer).attr("data-head", (c) => c.head).attr("tabindex", -1)
      .attr("x", (c) => c.x).attr("y", (c) => c.y).attr("width", shape.inner.width).attr("height", shape.inner.height);
    rects = cells.selectAll("rect");
    const byPlace = [...rects.nodes()].sort((a, b) => a.dataset.layer - b.dataset.layer || a.dataset.head - b.dataset.head);
    rects = select(cells.node()).selectAll(() => byPlace);
    svg.classed("calm", rects.size() > 1200);
    paint();
    ring();
    if (focused) node(cursor).focus();
  }

  function paint() {
    if (!shape) return;
    const asked = question();
    const { low, high } = data.ranking(asked);
    const { colour } = scoreScale(low, high, theme.get());
    const { role, roles } = store.get();
    rects.each(function () {
      const at = { layer: +this.dataset.layer, head: +this.dataset.head };
      const found = place(at);
      const score = found ? data.score(asked, found) : null;
      this.setAttribute("fill", score === null ? `url(#${hatch})` : colour(score));
      this.setAttribute("aria-label", words(at).join(", "));
      this.classList.toggle("faint", Boolean(role) && (!found || data.role(found) !== role));
    });
    marks.selectAll("*").remove();
    if (roles || role) drawMarks(role);
  }

  function drawMarks(only) {
    const radius = Math.max(1.2, Math.min(6, shape.short * 0.3));
    const paths = new Map();
    for (const found of data.heads) {
      const role = data.role(found);
      if (found.stream !== stream.name || !role || (only ? role !== only : role === MIXED)) continue;
      const { x, y } = shape.centre(found);
      paths.set(role, (paths.get(role) ?? "") + roleLook(data, role).shape(x, y, radius));
    }
    marks.selectAll("path").data(paths).join("path").attr("d", ([, d]) => d).style("fill", ([role]) => roleLook(data, role).colour);
  }

  function ring() {
    if (!shape) return;
    const chosen = data.places.get(store.get().head);
    const here = chosen?.stream === stream.name ? chosen : null;
    if (here) cursor = { layer: here.layer, head: here.head };
    rects.attr("tabindex", -1).attr("aria-selected", null);
    node(cursor).setAttribute("tabindex", 0);
    if (here) node(cursor).setAttribute("aria-selected", "true");
    rings.selectAll("rect.chosen").data(here ? [here, here] : []).join("rect").attr("class", (_, i) => (i ? "chosen inner" : "chosen outer"))
      .each(function (at) { frame(this, at, 1); });
  }

  function frame(rect, at, out) {
    const { x, y } = shape.corner(at);
    select(rect).attr("x", x - out).attr("y", y - out).attr("width", shape.inner.width + 2 * out).attr("height", shape.inner.height + 2 * out).attr("rx", 1.5);
  }

  function showFocus(at) {
    rings.selectAll("rect.focus").data(at ? [at] : []).join("rect").attr("class", "focus").each(function () { frame(this, at, 3); });
  }

  function tipAt(at) {
    const { left, top } = svg.node().getBoundingClientRect();
    tip.show(words(at), left + shape.centre(at).x, top + shape.corner(at).y, shape.inner.height);
  }

  function choose(at) {
    const found = place(at);
    if (!found) return say(`${words(at).join(", ")}`);
    store.set({ head: found.key });
    say(`Selected ${data.spoken(found)}: ${words(at).slice(1).join(", ")}`);
  }

  svg.on("pointermove", (event) => {
    const at = cellAt(shape, pointer(event, svg.node()));
    if (at) tipAt(at);
    else tip.hide();
  }).on("pointerleave", tip.hide).on("click", (event) => {
    const at = cellAt(shape, pointer(event, svg.node()));
    if (!at) return;
    cursor = at;
    node(at).focus({ preventScroll: true });
    choose(at);
  });
  // On the figure: an SVG group that listens for focus or keys would become a tab stop itself.
  figure.on("focusin", (event) => {
    cursor = { layer: +event.target.dataset.layer, head: +event.target.dataset.head };
    rects.attr("tabindex", -1);
    event.target.setAttribute("tabindex", 0);
    if (event.target.matches(":focus-visible")) {
      showFocus(cursor);
      tipAt(cursor);
    }
  }).on("focusout", () => {
    showFocus(null);
    tip.hide();
  }).on("keydown", (event) => {
    if (event.altKey || event.metaKey) return;
    if (event.key === "Enter" || event.key === " ") choose(cursor);
    else if (event.key === "Escape") tip.hide();
    else {
      const next = step(shape, cursor, event.key, event.ctrlKey);
      if (!next) return;
      node(next).focus();
    }
    event.preventDefault();
  });

  onWidth(figure.node(), build);
  store.watch(["question", "role", "roles"], paint);
  store.watch(["head"], ring);
  theme.watch(paint);
}

function drawAxes(axes, shape) {
  axes.selectAll("*").remove();
  axes.append("text").attr("class", "name").attr("x", shape.left).attr("y", 11).text(`${shape.across} →`);
  axes.append("text").attr("class", "name").attr("x", shape.left - 6).attr("y", 11).attr("text-anchor", "end").text(`${shape.down} ↓`);
  axes.selectAll("text.x").data(shape.xTicks).join("text").attr("class", "x").attr("x", (t) => t.at).attr("y", 25).attr("text-anchor", "middle").text((t) => t.text);
  axes.selectAll("text.y").data(shape.yTicks).join("text").attr("class", "y").attr("x", shape.left - 6).attr("y", (t) => t.at).attr("dy", "0.34em").attr("text-anchor", "end").text((t) => t.text);
}
