// The report: reads the data in the page, makes the views, keeps the address.
import { select } from "./vendor/d3.js";
import { Data } from "./data.js";
import { createStore, fromHash, startState, toHash } from "./store.js";
import { createTheme } from "./theme.js";
import { createTip } from "./parts.js";
import { headerView } from "./header.js";
import { questionsView } from "./questions.js";
import { askedView } from "./asked.js";
import { gridView } from "./grid.js";
import { legendView } from "./legend.js";
import { rolesView } from "./roles.js";
import { rankingView } from "./ranking.js";
import { cardView } from "./card.js";
import { matrixView } from "./matrix.js";

// Draws all views of a payload into an element; the store it returns tells and sets what is chosen.
export function mount(root, payload, hash = "") {
  const data = new Data(payload);
  const store = createStore(data, startState(data, hash));
  root.textContent = "";
  root.classList.add("hw");
  const theme = createTheme(root);
  const live = select(root).append("div").attr("class", "hidden").attr("role", "status").attr("aria-live", "polite");
  const say = (words) => live.text(words);
  headerView(root, data, theme);
  const body = select(root).append("main").node();
  const rail = select(body).append("div").attr("class", "rail").node();
  const centre = select(body).append("div").attr("class", "centre").node();
  const side = select(body).append("div").attr("class", "side").node();
  const below = select(body).append("div").attr("class", "below").node();
  const tip = createTip(root);
  questionsView(rail, data, store, theme);
  askedView(centre, data, store);
  gridView(centre, data, store, theme, tip, say);
  legendView(centre, data, store, theme);
  cardView(side, data, store, theme, say);
  rankingView(below, data, store, theme, say);
  rolesView(below, data, store);
  for (const matrix of payload.matrices) matrixView(below, matrix, theme, tip);
  return store;
}

export function start(page) {
  const payload = JSON.parse(page.getElementById("headwise-data").textContent);
  const store = mount(page.getElementById("headwise"), payload, location.hash);
  store.watch(["question", "head", "role", "roles"], (state) => history.replaceState(null, "", toHash(state)));
  window.addEventListener("hashchange", () => store.set(fromHash(location.hash)));
}
