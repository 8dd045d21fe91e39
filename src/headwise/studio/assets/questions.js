// The questions, each with a thumbnail of its grid; one column is chosen. A question with several columns is one choice,
// and shows the others when one of them is chosen. Many questions can be searched.
import { scoreScale } from "./colour.js";
import { panel, uniqueId } from "./parts.js";

const SEARCHED = 12;

export function questionsView(parent, data, store, theme) {
  const section = panel(parent, "questions", "Questions");
  const group = uniqueId("question");
  if (data.groups.length > SEARCHED) searchField(section, (words) => show(words));
  const list = section.append("div").attr("class", "choices").attr("role", "radiogroup").attr("aria-label", "Colour the heads by");
  const labels = list.selectAll("label").data(data.groups.flatMap(({ columns }) => columns.map((question, place) => ({ question, columns, place }))))
    .join("label").attr("class", "choice").classed("further", ({ place }) => place > 0);
  labels.append("input").attr("type", "radio").attr("name", group).attr("value", ({ question }) => question.name).on("change", (_, { question }) => store.set({ question: question.name }));
  labels.append("canvas").attr("aria-hidden", "true");
  labels.append("span").text(({ question }) => data.title(question));
  labels.filter(({ columns, place }) => place === 0 && columns.length > 1).append("small").attr("class", "many")
    .attr("title", ({ columns }) => `${columns.length} columns`).text(({ columns }) => `+${columns.length - 1}`);
  const none = section.append("p").attr("class", "note").attr("hidden", "").text("No question has these words.");
  leftOut(section, data);

  // Without words: the first column of every question, and all columns of the chosen one; with words: what has them.
  let words = "";
  const show = (typed = words) => {
    words = typed;
    const chosen = store.get().question;
    const parts = words.toLowerCase().split(/\s+/).filter(Boolean);
    const has = ({ question }) => parts.every((part) => `${question.name} ${data.title(question)} ${question.what} ${question.paper?.title ?? ""}`.toLowerCase().includes(part));
    const open = ({ columns }) => columns.some((column) => column.name === chosen);
    labels.attr("hidden", (entry) => ((parts.length ? has(entry) : entry.place === 0 || open(entry)) ? null : ""));
    none.attr("hidden", labels.nodes().some((label) => !label.hidden) ? "" : null);
  };
  const paint = () => labels.each(function ({ question }) {
    thumbnail(this.querySelector("canvas"), data, question, theme.get());
  });
  theme.watch(paint);
  paint();
  store.watch(["question"], (state) => {
    labels.classed("chosen", ({ question }) => question.name === state.question).select("input").property("checked", ({ question }) => question.name === state.question);
    show();
    bring(list.node(), labels.filter(({ question }) => question.name === state.question).node());
  });
}

// Scrolls the strip or the list, never the page.
function bring(strip, chosen) {
  if (strip.scrollWidth > strip.clientWidth) strip.scrollLeft = chosen.offsetLeft - strip.clientWidth / 3;
  const [top, bottom] = [chosen.offsetTop, chosen.offsetTop + chosen.offsetHeight];
  if (top < strip.scrollTop || bottom > strip.scrollTop + strip.clientHeight) strip.scrollTop = top - strip.clientHeight / 3;
}

function searchField(section, show) {
  section.append("input").attr("type", "search").attr("class", "search").attr("placeholder", "Search").attr("aria-label", "Search the questions")
    .on("input", (event) => show(event.target.value));
}

// One pixel a head, layers from left to right; streams beside each other.
function thumbnail(canvas, data, question, theme) {
  const { low, high } = data.ranking(question);
  const { colour } = scoreScale(low, high, theme);
  const gap = 1;
  canvas.width = data.streams.reduce((sum, stream) => sum + stream.layers.length + gap, -gap);
  canvas.height = Math.max(...data.streams.map((stream) => stream.heads));
  const pen = canvas.getContext("2d");
  let left = 0;
  for (const stream of data.streams) {
    stream.layers.forEach((_, layer) => {
      for (let head = 0; head < stream.heads; head++) {
        const score = data.score(question, { stream: stream.name, layer, head });
        if (score === null) continue;
        pen.fillStyle = colour(score);
        pen.fillRect(left + layer, head, 1, 1);
      }
    });
    left += stream.layers.length + gap;
  }
}

function leftOut(section, data) {
  const names = Object.entries(data.payload.left_out);
  if (!names.length) return;
  const details = section.append("details").attr("class", "leftout");
  details.append("summary").text(`Not asked (${names.length})`);
  const list = details.append("dl");
  for (const [name, reason] of names) {
    list.append("dt").text(name);
    list.append("dd").text(reason);
  }
}
