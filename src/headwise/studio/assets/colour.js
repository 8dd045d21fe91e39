// Colours of scores. Equal steps of a score are equal steps of colour: each ramp is walked by its length in CIELAB.
import { interpolateBasis, lab } from "./vendor/d3.js";

// From black through blue and teal to pale mint (the map "mako").
const COOL = ["#0b0405", "#28192f", "#3b2f5e", "#40498e", "#366a9f", "#348aa6", "#38aaac", "#54c9ad", "#a0dfb9", "#def5e5"];
const WARM = { light: ["#ecece8", "#e9b98a", "#cf7a45", "#9c3f2c", "#5a1a20"], dark: ["#262b30", "#6d3a2b", "#b3592f", "#e09a55", "#f8dcae"] };
const STEPS = 256, FINE = 4096;

function even(stops) {
  const points = stops.map((stop) => lab(stop));
  const [l, a, b] = ["l", "a", "b"].map((part) => interpolateBasis(points.map((point) => point[part])));
  const fine = Array.from({ length: FINE + 1 }, (_, i) => [l(i / FINE), a(i / FINE), b(i / FINE)]);
  const lengths = [0];
  for (let i = 1; i <= FINE; i++) lengths.push(lengths[i - 1] + Math.hypot(...fine[i].map((x, part) => x - fine[i - 1][part])));
  const table = [];
  for (let i = 0, at = 0; i <= STEPS; i++) {
    while (at < FINE && lengths[at] < (lengths[FINE] * i) / STEPS) at++;
    table.push(lab(...fine[at]).formatHex());
  }
  return (t) => table[Math.round(Math.max(0, Math.min(1, t)) * STEPS)];
}

const RAMPS = {};

function ramps(theme) {
  if (!RAMPS[theme]) {
    const cool = theme === "dark" ? COOL.slice(1) : [...COOL].reverse().slice(0, -1);
    const middle = WARM[theme][0];
    RAMPS[theme] = { one: even(cool), up: even([middle, ...cool.slice(2)]), down: even(WARM[theme]) };
  }
  return RAMPS[theme];
}

// The scale of a question: from 0, or from its lowest score where 0 is far away; around 0 where scores have two signs.
export function scoreScale(low, high, theme) {
  const { one, up, down } = ramps(theme);
  if (low < 0 && high > 0) {
    const reach = Math.max(-low, high);
    const colour = (value) => (value < 0 ? down(-value / reach) : up(value / reach));
    return { colour, domain: [-reach, reach] };
  }
  let [from, to] = low >= 0 ? [low > high / 2 ? low : 0, high] : [low, high < low / 2 ? high : 0];
  if (from === to) to = from + 1;
  return { colour: (value) => one((value - from) / (to - from)), domain: [from, to] };
}

export function inkOn(colour) {
  return lab(colour).l > 58 ? "#111417" : "#ffffff";
}

// Shape and colour of a role; a shape is drawn around (x, y) with half-width r.
const SHAPES = [
  (x, y, r) => `M${x},${y - r}L${x + r},${y + r * 0.8}H${x - r}Z`,
  (x, y, r) => `M${x - r * 0.85},${y - r * 0.85}h${r * 1.7}v${r * 1.7}h${-r * 1.7}Z`,
  (x, y, r) => `M${x - r},${y}a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0Z`,
  (x, y, r) => `M${x},${y - r}L${x + r},${y}L${x},${y + r}L${x - r},${y}Z`,
  (x, y, r) => `M${x},${y + r}L${x + r},${y - r * 0.8}H${x - r}Z`,
  (x, y, r) => `M${x - r},${y - r * 0.35}h${2 * r}v${r * 0.7}h${-2 * r}Z`,
  (x, y, r) => `M${x - r * 0.35},${y - r}v${2 * r}h${r * 0.7}v${-2 * r}Z`,
  (x, y, r) => `M${x - r},${y - r}L${x + r},${y}L${x - r},${y + r}Z`,
  (x, y, r) => `M${x + r},${y - r}L${x - r},${y}L${x + r},${y + r}Z`,
  (x, y, r) => `M${x - r * 0.3},${y - r}h${r * 0.6}v${r * 0.7}h${r * 0.7}v${r * 0.6}h${-r * 0.7}v${r * 0.7}h${-r * 0.6}v${-r * 0.7}h${-r * 0.7}v${-r * 0.6}h${r * 0.7}Z`,
];
export const MIXED = "mixed";

export function roleLook(data, role) {
  const named = [...data.roleNames.keys()].filter((name) => name !== MIXED);
  const place = named.indexOf(role);
  if (place < 0) return { colour: "var(--role-none)", shape: (x, y, r) => SHAPES[2](x, y, r * 0.3) };
  // After ten roles the colours come again, with other shapes.
  return { colour: `var(--role-${place % 10})`, shape: SHAPES[(place + 3 * Math.floor(place / 10)) % SHAPES.length] };
}
