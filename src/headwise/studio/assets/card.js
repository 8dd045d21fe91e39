// Everything known of the selected head.
import { scaleLinear, select } from "./vendor/d3.js";
import { number } from "./data.js";
import { scoreScale } from "./colour.js";
import { panel, roleMark } from "./parts.js";
import { distanceView, segmentsView } from "./profile.js";
import { sampleView } from "./sample.js";

const ALL = 16, BEST = 12;

export function cardView(parent, data, store, theme, say) {
  let every = false;
  const section = panel(parent, "card").attr("aria-label", "Selected head");
  const body = section.append("div");
  const draw = () => {
    const place = data.places.get(store.get().head);
    body.selectAll("*").remove();
    if (!place) return void body.append("p").text("This report has no heads.");
    heading(body, place);
    scores(body, place);
    const detail = data.detail(place.key);
    if (detail?.distance?.mass.length) distanceView(body, detail.distance);
    if (detail?.segments?.names.length) segmentsView(body, detail.segments);
    sampleView(body, data, store, theme, place);
  };

  function heading(body, place) {
    const head = body.append("div").attr("class", "cardhead");
    const title = head.append("h2");
    title.append("span").text("Layer ");
    title.append("b").text(data.layerNumber(place));
    title.append("span").text(" Head ");
    title.append("b").text(place.head);
    if (data.streams.length > 1) title.append("span").attr("class", "stream").text(place.stream);
    const steps = head.append("div").attr("class", "steps");
    for (const [by, sign, name] of [[-1, "↑", "Higher in the ranking"], [1, "↓", "Lower in the ranking"]]) {
      steps.append("button").attr("type", "button").attr("class", "plain").attr("aria-label", name).attr("title", name).text(sign).on("click", () => {
        const { order, ranks } = data.ranking(data.questions.get(store.get().question));
        const next = order[(ranks.get(place.key) ?? 0) - 1 + by];
        if (!next) return;
        store.set({ head: next.place.key });
        section.selectAll(".steps button").nodes()[by < 0 ? 0 : 1].focus();
        say(`Selected ${data.spoken(next.place)}`);
      });
    }
    const role = data.role(place);
    if (!role) return;
    const line = body.append("p").attr("class", "rule");
    const name = line.append("strong");
    roleMark(name, data, role);
    name.append("span").text(role);
    line.append("span").text(` ${data.rule(role)}`);
  }

  function scores(body, place) {
    const table = body.append("table").attr("class", "scores");
    table.append("caption").text("Scores");
    const titles = table.append("thead").append("tr");
    for (const name of ["Question", "", "Score", "Rank"]) titles.append("th").attr("scope", "col").text(name || null).append("span").attr("class", "hidden").text(name ? "" : "Bar");
    const columns = data.payload.questions;
    const some = columns.length > ALL;
    const rows = table.append("tbody").selectAll("tr").data(some && !every ? standsOut(place) : columns).join("tr").classed("chosen", (q) => q.name === store.get().question);
    rows.append("th").attr("scope", "row").append("button").attr("type", "button").text((q) => data.title(q)).attr("title", (q) => q.what)
      .on("click", (_, q) => store.set({ question: q.name }));
    rows.append("td").attr("class", "bar").append("div").each(function (q) {
      bar(select(this), q, data.score(q, place));
    });
    rows.append("td").attr("class", "value").text((q) => number(data.score(q, place)))
      .filter((q) => data.sem(q, place) !== null).append("small").text((q) => `± ${number(data.sem(q, place))}`);
    rows.append("td").attr("class", "rank").text((q) => data.ranking(q).ranks.get(place.key) ?? "");
    if (!some) return;
    table.select("caption").text(every ? "Scores" : "Where it stands out");
    body.append("button").attr("type", "button").attr("class", "plain more").text(every ? "Only where it stands out" : `All ${columns.length} scores`).on("click", () => {
      every = !every;
      draw();
      section.select("button.more").node().focus();
    });
  }

  // The columns in which the head ranks highest, and the chosen one.
  function standsOut(place) {
    const rank = (question) => data.ranking(question).ranks.get(place.key) ?? Infinity;
    const chosen = data.questions.get(store.get().question);
    const best = data.payload.questions.filter((q) => data.score(q, place) && rank(q) < Infinity).sort((a, b) => rank(a) - rank(b)).slice(0, BEST);
    return best.includes(chosen) ? best : [chosen, ...best];
  }

  function bar(box, question, score) {
    const { low, high } = data.ranking(question);
    const { colour, domain } = scoreScale(low, high, theme.get());
    const x = scaleLinear(domain, [0, 100]).clamp(true);
    if (score !== null) {
      const zero = x(0);
      box.append("i").style("left", `${Math.min(zero, x(score))}%`).style("width", `${Math.max(1, Math.abs(x(score) - zero))}%`).style("background", colour(score));
    }
    if (question.threshold !== null && question.threshold >= domain[0] && question.threshold <= domain[1]) box.append("s").style("left", `${x(question.threshold)}%`);
  }

  store.watch(["head"], draw);
  store.watch(["question"], (state) => {
    if (data.payload.questions.length > ALL && !every) draw();
    else body.selectAll(".scores tbody tr").classed("chosen", (q) => q.name === state.question);
  });
  theme.watch(draw);
}
