// The heads in the order of the chosen question, the highest first.
import { scaleLinear, select } from "./vendor/d3.js";
import { number } from "./data.js";
import { scoreScale } from "./colour.js";
import { panel, roleMark } from "./parts.js";

const FIRST = 15, MORE = 60;

export function rankingView(parent, data, store, theme, say) {
  const section = panel(parent, "ranking", "Ranking");
  const note = section.append("p").attr("class", "note");
  const list = section.append("ol");
  const more = section.append("button").attr("type", "button").attr("class", "plain more");
  let shown = FIRST;

  const draw = () => {
    const { question: name, role } = store.get();
    const question = data.questions.get(name);
    const { order, ranks, low, high } = data.ranking(question);
    const kept = role ? order.filter((entry) => data.role(entry.place) === role) : order;
    const { colour, domain } = scoreScale(low, high, theme.get());
    const x = scaleLinear(domain, [0, 100]).clamp(true);
    const zero = x(0);
    note.text(`${data.title(question)}${role ? `, ${role} heads only` : ""}${kept.some((e) => data.sem(question, e.place) !== null) ? "; ± is one standard error" : ""}`);
    list.selectAll("li").remove();
    const rows = list.selectAll("li").data(kept.slice(0, shown)).join("li").append("button").attr("type", "button").attr("data-key", (e) => e.place.key)
      .on("click", (_, e) => {
        store.set({ head: e.place.key });
        say(`Selected ${data.spoken(e.place)}`);
      });
    rows.append("span").attr("class", "rank").text((e) => ranks.get(e.place.key));
    rows.append("span").attr("class", "who").text((e) => data.label(e.place));
    const roles = rows.append("span").attr("class", "role").filter((e) => data.role(e.place));
    roles.each(function (e) {
      roleMark(select(this), data, data.role(e.place));
    });
    roles.append("span").text((e) => data.role(e.place));
    const bars = rows.append("span").attr("class", "bar").attr("aria-hidden", "true");
    bars.append("i").style("left", (e) => `${Math.min(zero, x(e.score))}%`).style("width", (e) => `${Math.max(0.6, Math.abs(x(e.score) - zero))}%`).style("background", (e) => colour(e.score));
    bars.filter((e) => data.sem(question, e.place) !== null).append("b")
      .style("left", (e) => `${x(e.score - data.sem(question, e.place))}%`)
      .style("width", (e) => `${x(e.score + data.sem(question, e.place)) - x(e.score - data.sem(question, e.place))}%`);
    rows.append("span").attr("class", "value").text((e) => number(e.score))
      .filter((e) => data.sem(question, e.place) !== null).append("small").text((e) => ` ± ${number(data.sem(question, e.place))}`);
    const rest = kept.length - Math.min(shown, kept.length);
    more.attr("hidden", rest ? null : "").text(`Show ${Math.min(rest, MORE)} more of ${rest}`);
    mark();
  };
  const mark = () => list.selectAll("button").attr("aria-current", (e) => (e.place.key === store.get().head ? "true" : null));
  more.on("click", () => {
    const before = shown;
    shown += MORE;
    draw();
    list.selectAll("button").nodes()[before]?.focus();
  });
  store.watch(["question", "role"], () => {
    shown = FIRST;
    draw();
  });
  store.watch(["head"], mark);
  theme.watch(draw);
}
