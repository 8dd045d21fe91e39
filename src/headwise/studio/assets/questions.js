// The questions, each with a thumbnail of its grid; one is chosen.
import { scoreScale } from "./colour.js";
import { panel, uniqueId } from "./parts.js";

export function questionsView(parent, data, store, theme) {
  const section = panel(parent, "questions", "Questions");
  const group = uniqueId("question");
  const list = section.append("div").attr("class", "choices").attr("role", "radiogroup").attr("aria-label", "Colour the heads by");
  const labels = list.selectAll("label").data(data.payload.questions).join("label").attr("class", "choice");
  labels.append("input").attr("type", "radio").attr("name", group).attr("value", (q) => q.name).on("change", (_, q) => store.set({ question: q.name }));
  labels.append("canvas").attr("aria-hidden", "true");
  labels.append("span").text((q) => data.title(q));
  leftOut(section, data);

  const paint = () => labels.each(function (question) {
    thumbnail(this.querySelector("canvas"), data, question, theme.get());
  });
  theme.watch(paint);
  paint();
  store.watch(["question"], (state) => {
    labels.classed("chosen", (q) => q.name === state.question).select("input").property("checked", (q) => q.name === state.question);
    const strip = list.node();
    const chosen = labels.filter((q) => q.name === state.question).node();
    if (strip.scrollWidth > strip.clientWidth) strip.scrollLeft = chosen.offsetLeft - strip.clientWidth / 3;
  });
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
