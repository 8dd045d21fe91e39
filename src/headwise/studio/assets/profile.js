// How far a head looks, and at which parts of the input.
import { format, max, scaleBand, scaleLinear } from "./vendor/d3.js";
import { number } from "./data.js";
import { onWidth } from "./parts.js";

const HEIGHT = 118, LEFT = 30, BOTTOM = 20, TOP = 14;
const percent = format(".0%");

export function distanceView(parent, { edges, mass }) {
  const figure = parent.append("figure").attr("class", "profile");
  figure.append("figcaption").text("Distance profile").append("small").text(" share of attention by tokens away; bars double in width");
  const names = mass.map((_, i) => binName(edges, i));
  const said = mass.map((value, i) => `${names[i]}: ${number(value)}`).join("; ");
  const svg = figure.append("svg").attr("height", HEIGHT).attr("role", "img").attr("aria-label", `Share of attention by distance in tokens. ${said}.`);
  onWidth(figure.node(), (width) => {
    svg.attr("width", width).selectAll("*").remove();
    const x = scaleBand(mass.map((_, i) => i), [LEFT, width]).paddingInner(0.12);
    const y = scaleLinear([0, Math.max(0.05, max(mass, (value) => value ?? 0))], [HEIGHT - BOTTOM, TOP]);
    const lines = svg.append("g").attr("class", "ticks").selectAll("g").data(y.ticks(3)).join("g").attr("transform", (t) => `translate(0,${y(t)})`);
    lines.append("line").attr("x1", LEFT).attr("x2", width);
    lines.append("text").attr("x", LEFT - 5).attr("dy", "0.34em").attr("text-anchor", "end").text(percent);
    const bars = svg.append("g").selectAll("g").data(mass).join("g").attr("transform", (_, i) => `translate(${x(i)},0)`);
    bars.append("title").text((value, i) => `${names[i]}: ${number(value)}`);
    bars.append("rect").attr("class", "bar").attr("width", x.bandwidth()).attr("y", (v) => y(v ?? 0)).attr("height", (v) => y(0) - y(v ?? 0));
    bars.filter((v) => (v ?? 0) >= 0.005).append("text").attr("class", "onbar").attr("x", x.bandwidth() / 2).attr("y", (v) => y(v) - 3).attr("text-anchor", "middle").text((v) => Math.round(v * 100));
    const every = x.step() < 23 ? 2 : 1;
    bars.filter((_, i) => i % every === 0).append("text").attr("class", "tick").attr("x", x.bandwidth() / 2).attr("y", HEIGHT - 6).attr("text-anchor", "middle").text((_, i) => short(edges[i * every]));
  });
}

function short(edge) {
  return edge >= 1024 && edge % 1024 === 0 ? `${edge / 1024}k` : edge;
}

function binName(edges, i) {
  const [from, to] = [edges[i], edges[i + 1]];
  if (to === undefined) return `${from} tokens and more`;
  return to - from === 1 ? `${from} ${from === 1 ? "token" : "tokens"}` : `${from} to ${to - 1} tokens`;
}

export function segmentsView(parent, { names, mass }) {
  const figure = parent.append("figure").attr("class", "segments");
  figure.append("figcaption").text("Mass per segment").append("small").text(" share of attention");
  const top = Math.max(0.05, max(mass, (value) => value ?? 0));
  const rows = figure.append("ul").selectAll("li").data(names.map((name, i) => ({ name, value: mass[i] }))).join("li");
  rows.append("span").attr("class", "name").text((row) => row.name);
  rows.append("span").attr("class", "bar").attr("aria-hidden", "true").append("i").style("width", (row) => `${(100 * (row.value ?? 0)) / top}%`);
  rows.append("span").attr("class", "value").text((row) => number(row.value));
}
