// A sample sentence, token by token: pointing at one shows what the head looks at from there.
import { format, select } from "./vendor/d3.js";
import { inkOn, scoreScale } from "./colour.js";

const share = format(".2f");
const TELLING = 0.2;
const NEAR = 12; // other heads offered when this one has no rows

export function sampleView(parent, data, store, theme, place) {
  const sample = data.payload.sample;
  const section = parent.append("figure").attr("class", "sample");
  section.append("figcaption").text("Token by token");
  const rows = data.rows(place.key);
  if (!rows) return void elsewhere(section, data, store, sample);
  const { colour } = scoreScale(0, 1, theme.get());
  const intro = section.append("div").attr("class", "intro");
  intro.append("p").attr("class", "note").text("Point at a token, or move with the arrows. Colour shows how much the outlined token looks at each other one. The map shows all tokens at once: a row for each, eight strongest kept.");
  const map = intro.append("canvas").attr("class", "map").attr("aria-hidden", "true");
  const list = section.append("div").attr("class", "tokens").attr("role", "listbox").attr("aria-label", "Tokens of the sample");
  const tokens = list.selectAll("span").data(sample.tokens).join("span").attr("class", "token").attr("role", "option").attr("aria-label", (t, i) => `${i}: ${visible(t)}`).text(visible)
    .classed("breaks", (t) => t.includes("\n"));
  const told = section.append("p").attr("class", "told").attr("aria-live", "polite");
  let pinned = liveliest(rows);

  function show(query) {
    const weights = new Map(rows[query]);
    tokens.each(function (_, key) {
      const weight = weights.get(key) ?? 0;
      const fill = weight ? colour(weight) : "";
      select(this).classed("query", key === query).attr("aria-selected", String(key === query)).style("background-color", fill || null).style("color", fill ? inkOn(fill) : null);
    });
    told.selectAll("*").remove();
    told.append("span").text("From ");
    told.append("q").text(quoted(sample.tokens[query]));
    told.append("span").text(` (${query}) to `);
    const telling = rows[query].filter(([, weight]) => weight >= 0.005);
    telling.forEach(([key, weight], i) => {
      told.append("span").text(i ? ", " : "");
      told.append("q").text(quoted(sample.tokens[key]));
      told.append("span").attr("class", "weight").text(`\u00a0${share(weight)}`);
    });
    const rest = 1 - telling.reduce((sum, [, weight]) => sum + weight, 0);
    told.append("span").text(rest > 0.005 ? `; ${share(rest)} elsewhere.` : ".");
    drawMap(map.node(), rows, query, colour, theme.get());
  }

  function pin(query, focus) {
    pinned = query;
    tokens.attr("tabindex", (_, i) => (i === query ? 0 : -1));
    show(query);
    if (focus) tokens.nodes()[query].focus();
  }

  const indexOf = (event) => tokens.nodes().indexOf(event.target.closest(".token"));
  list.on("pointerover", (event) => {
    if (event.pointerType !== "touch" && indexOf(event) >= 0) show(indexOf(event));
  }).on("pointerleave", () => show(pinned)).on("click", (event) => {
    if (indexOf(event) >= 0) pin(indexOf(event), true);
  }).on("keydown", (event) => {
    const last = rows.length - 1;
    const next = { ArrowRight: pinned + 1, ArrowDown: pinned + 1, ArrowLeft: pinned - 1, ArrowUp: pinned - 1, Home: 0, End: last }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    pin(Math.max(0, Math.min(last, next)), true);
  });
  map.on("click", (event) => {
    const { top, height } = map.node().getBoundingClientRect();
    pin(Math.max(0, Math.min(rows.length - 1, Math.floor(((event.clientY - top) / height) * rows.length))), false);
  });
  pin(pinned, false);
}

// The row that shows most: where another token than the first and itself gets the largest weight; else the last row.
function liveliest(rows) {
  const strength = rows.map((row, query) => Math.max(0, ...row.filter(([key]) => key > 0 && key !== query).map(([, weight]) => weight)));
  const most = Math.max(0, ...strength);
  return most < TELLING ? rows.length - 1 : strength.lastIndexOf(most);
}

// A pixel a pair of tokens: queries down, keys across; the shown query is underlined.
function drawMap(canvas, rows, query, colour, theme) {
  const size = rows.length;
  const cell = Math.max(2, Math.floor(280 / size));
  canvas.width = canvas.height = size * cell;
  const pen = canvas.getContext("2d");
  pen.fillStyle = colour(0);
  pen.fillRect(0, 0, canvas.width, canvas.height);
  rows.forEach((row, i) => {
    for (const [key, weight] of row) {
      pen.fillStyle = colour(weight);
      pen.fillRect(key * cell, i * cell, cell, cell);
    }
  });
  pen.strokeStyle = theme === "dark" ? "#ffb454" : "#b3261e";
  pen.lineWidth = 1.5;
  pen.strokeRect(0.75, query * cell - 0.75, canvas.width - 1.5, cell + 1.5);
}

function elsewhere(section, data, store, sample) {
  const keys = Object.keys(sample?.rows ?? {}).filter((key) => data.places.has(key));
  if (!keys.length) return void section.append("p").attr("class", "note").text("This report holds no sample sentence.");
  section.append("p").attr("class", "note").text(`The rows of the map were kept for ${keys.length} heads; this is not one of them. Strongest with rows:`);
  const { ranks } = data.ranking(data.questions.get(store.get().question));
  keys.sort((a, b) => (ranks.get(a) ?? Infinity) - (ranks.get(b) ?? Infinity));
  section.append("div").attr("class", "chips").selectAll("button").data(keys.slice(0, NEAR)).join("button").attr("type", "button").attr("class", "chip")
    .text((key) => data.label(data.places.get(key))).on("click", (_, key) => store.set({ head: key }));
}

function quoted(token) {
  return visible(token).trim();
}

// White space made visible: a leading space is kept as a gap by the style, a line break as a sign.
function visible(token) {
  if (token === "") return "∅";
  return token.replace(/\r?\n/g, "↵").replace(/\t/g, "⇥").replace(/^ +$/, (spaces) => "␣".repeat(spaces.length));
}
