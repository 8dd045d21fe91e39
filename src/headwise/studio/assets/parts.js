// Small parts that several views share.
import { select } from "./vendor/d3.js";
import { roleLook } from "./colour.js";

let made = 0;
export const uniqueId = (name) => `hw-${name}-${++made}`;

export function roleMark(selection, data, role, size = 12) {
  const look = roleLook(data, role);
  return selection
    .append("svg").attr("class", "mark").attr("width", size).attr("height", size).attr("aria-hidden", "true")
    .append("path").attr("d", look.shape(size / 2, size / 2, size * 0.38)).style("fill", look.colour);
}

export function panel(parent, name, title) {
  const section = select(parent).append("section").attr("class", `panel ${name}`);
  if (title) {
    const id = uniqueId(name);
    section.attr("aria-labelledby", id).append("h2").attr("id", id).text(title);
  }
  return section;
}

// A box that follows the pointer or the focused cell. It only repeats what the focused element says by itself.
export function createTip(root) {
  const box = select(root).append("div").attr("class", "tip").attr("aria-hidden", "true").attr("hidden", "");
  return {
    show(lines, x, y, tall) {
      box.attr("hidden", null).selectAll("div").data(lines).join("div").text((line) => line);
      const { width, height } = box.node().getBoundingClientRect();
      const room = document.documentElement.clientWidth;
      const above = y - height - 14 > 0;
      box.style("left", `${Math.max(4, Math.min(room - width - 4, x - width / 2))}px`);
      box.style("top", `${above ? y - height - 8 : y + tall + 8}px`);
    },
    hide() {
      box.attr("hidden", "");
    },
  };
}

// Draws now and whenever the width of the element changes.
export function onWidth(element, draw) {
  let width = 0;
  let waiting = false;
  const check = () => {
    waiting = false;
    const now = Math.floor(element.clientWidth);
    if (now && now !== width) draw((width = now));
  };
  new ResizeObserver(() => {
    if (!waiting) waiting = requestAnimationFrame(check) > 0;
  }).observe(element);
  check();
}
