// Small tables as heat maps, such as the similarity of two models' layers.
import { extent } from "./vendor/d3.js";
import { number } from "./data.js";
import { scoreScale } from "./colour.js";
import { onWidth, panel } from "./parts.js";

const LEFT = 44, TOP = 34, LARGEST = 26;

export function matrixView(parent, matrix, theme, tip) {
  const { title, what, rows, columns, row_names, column_names, values } = matrix;
  const section = panel(parent, "matrix", title);
  if (what) section.append("p").attr("class", "note").text(what);
  const [low, high] = extent(values.flat().filter((value) => value !== null));
  const svg = section.append("svg").attr("role", "img").attr("aria-label", `${title}: ${rows} by ${columns}, from ${number(low)} to ${number(high)}.`);
  section.append("p").attr("class", "note").text(`From ${number(low)} to ${number(high)}.`);
  let width = 0;
  const draw = () => {
    if (!width) return;
    const size = Math.min(LARGEST, (width - LEFT) / column_names.length);
    const { colour } = scoreScale(low ?? 0, high ?? 0, theme.get());
    svg.attr("width", width).attr("height", TOP + size * row_names.length + 2).selectAll("*").remove();
    const cells = values.flatMap((line, row) => line.map((value, column) => ({ value, row, column })));
    svg.append("g").selectAll("rect").data(cells.filter((cell) => cell.value !== null)).join("rect")
      .attr("x", (cell) => LEFT + cell.column * size).attr("y", (cell) => TOP + cell.row * size)
      .attr("width", Math.max(1, size - 0.5)).attr("height", Math.max(1, size - 0.5)).attr("fill", (cell) => colour(cell.value))
      .on("mouseenter", (event, cell) => {
        const box = event.target.getBoundingClientRect();
        tip.show([`${row_names[cell.row]}, ${column_names[cell.column]}`, number(cell.value)], box.x + box.width / 2, box.y, box.height);
      })
      .on("mouseleave", () => tip.hide());
    const axes = svg.append("g").attr("class", "axes");
    axes.append("text").attr("class", "name").attr("x", LEFT).attr("y", 11).text(`${columns} →`);
    axes.append("text").attr("class", "name").attr("transform", `translate(11,${TOP}) rotate(-90)`).attr("text-anchor", "end").text(`← ${rows}`);
    const every = Math.max(1, Math.ceil(24 / size));
    label(axes, column_names, every, (i) => [LEFT + (i + 0.5) * size, TOP - 5], "middle");
    label(axes, row_names, Math.max(1, Math.ceil(13 / size)), (i) => [LEFT - 5, TOP + (i + 0.5) * size + 4], "end");
  };
  onWidth(section.node(), (now) => {
    width = now - 34;
    draw();
  });
  theme.watch(draw);
}

function label(axes, names, every, place, anchor) {
  axes.append("g").selectAll("text").data(names.map((name, i) => ({ name, i })).filter(({ i }) => i % every === 0)).join("text")
    .attr("x", ({ i }) => place(i)[0]).attr("y", ({ i }) => place(i)[1]).attr("text-anchor", anchor).text(({ name }) => name);
}
