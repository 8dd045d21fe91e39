// What the chosen question asks, how its score reads, and the paper it comes from.
import { select } from "./vendor/d3.js";

export function askedView(parent, data, store) {
  const box = select(parent).append("div").attr("class", "asked");
  store.watch(["question"], (state) => {
    const question = data.questions.get(state.question);
    box.selectAll("*").remove();
    box.append("h2").text(data.title(question));
    if (question.what) box.append("p").attr("class", "what").text(question.what);
    const facts = box.append("p").attr("class", "reading");
    if (question.higher) facts.append("span").text(`High: ${question.higher}.`);
    if (question.threshold !== null) facts.append("span").text(above(data, question));
    if (question.paper?.title) {
      const { title, arxiv } = question.paper;
      const source = facts.append("span").text("After ");
      const cite = arxiv ? source.append("a").attr("href", `https://arxiv.org/abs/${arxiv}`).attr("rel", "noreferrer") : source.append("cite");
      cite.text(title);
    }
  });
}

function above(data, question) {
  const { order } = data.ranking(question);
  const many = order.filter((entry) => entry.score >= question.threshold).length;
  return `${many} of ${order.length} heads reach ${question.threshold}.`;
}
