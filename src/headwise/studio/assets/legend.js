// The colour scale with its unit, how many heads have which score, the threshold, and the selected head.
import { bin, max, range, scaleLinear, select } from "./vendor/d3.js";
import { number } from "./data.js";
import { scoreScale } from "./colour.js";
import { onWidth } from "./parts.js";

const MARGIN = 10, HEIGHT = 78, BAR = 40, THICK = 10, BINS = 48;

export function legendView(parent, data, store, theme) {
  const figure = select(parent).append("figure").attr("class", "legend");
  const svg = figure.append("svg").attr("height", HEIGHT).attr("role", "img");
  const unit = figure.append("figcaption");
  let width = 0;

  const draw = () => {
    if (!width) return;
    const state = store.get();
    const question = data.questions.get(state.question);
    const { order, low, high } = data.ranking(question);
    const { colour, domain } = scoreScale(low, high, theme.get());
    const x = scaleLinear(domain, [MARGIN, width - MARGIN]);
    svg.attr("width", width).selectAll("*").remove();
    svg.attr("aria-label", `Scores from ${number(low)} to ${number(high)}${question.unit ? `, ${question.unit}` : ""}.`);
    unit.text(question.unit);

    const edges = range(BINS).map((i) => domain[0] + ((domain[1] - domain[0]) * i) / BINS);
    const bins = bin().domain(domain).thresholds(edges.slice(1))(order.map((entry) => entry.score));
    const top = max(bins, (b) => b.length) || 1;
    // Square roots: one head beside 200 must still be seen.
    const y = (many) => (many ? Math.max(2, Math.sqrt(many / top) * (BAR - 10)) : 0);
    svg.append("g").attr("class", "histogram").selectAll("rect").data(bins).join("rect")
      .attr("x", (b) => x(b.x0)).attr("width", (b) => Math.max(1, x(b.x1) - x(b.x0) - 1))
      .attr("y", (b) => BAR - 1 - y(b.length)).attr("height", (b) => y(b.length));

    const steps = 96;
    svg.append("g").selectAll("rect").data(range(steps)).join("rect")
      .attr("x", (i) => MARGIN + ((width - 2 * MARGIN) * i) / steps).attr("width", (width - 2 * MARGIN) / steps + 0.6)
      .attr("y", BAR).attr("height", THICK)
      .attr("fill", (i) => colour(domain[0] + ((domain[1] - domain[0]) * (i + 0.5)) / steps));

    const ticks = svg.append("g").attr("class", "ticks").selectAll("g").data(x.ticks(width < 420 ? 4 : 6)).join("g").attr("transform", (t) => `translate(${x(t)},${BAR + THICK})`);
    ticks.append("line").attr("y2", 4);
    ticks.append("text").attr("y", 16).attr("text-anchor", "middle").text(x.tickFormat(width < 420 ? 4 : 6));

    if (question.threshold !== null && question.threshold >= domain[0] && question.threshold <= domain[1]) {
      const line = svg.append("g").attr("class", "threshold").attr("transform", `translate(${x(question.threshold)},0)`);
      line.append("line").attr("y1", 4).attr("y2", BAR + THICK);
      const right = x(question.threshold) < width - 90;
      line.append("text").attr("x", right ? 5 : -5).attr("y", 11).attr("text-anchor", right ? "start" : "end").text(`from ${question.threshold}`);
    }
    const score = data.places.has(state.head) ? data.score(question, data.places.get(state.head)) : null;
    if (score !== null) svg.append("path").attr("class", "here").attr("d", `M${x(score)},${BAR - 1}l-5,-8h10Z`);
  };
  onWidth(figure.node(), (now) => {
    width = now;
    draw();
  });
  store.watch(["question", "head"], draw);
  theme.watch(draw);
}
