// The roles: a mark for each, its rule, how many heads have it; one can be picked out.
import { select } from "./vendor/d3.js";
import { MIXED } from "./colour.js";
import { panel, roleMark } from "./parts.js";

export function rolesView(parent, data, store) {
  if (![...data.roleNames.values()].some((many) => many > 0)) return;
  const section = panel(parent, "roles", "Roles");
  const toggle = section.append("label").attr("class", "switch");
  toggle.append("input").attr("type", "checkbox").attr("class", "show-roles").on("change", (event) => store.set({ roles: event.target.checked }));
  toggle.append("span").text("Mark them in the grid");
  const list = section.append("ul");
  const present = [...data.roleNames].filter(([, many]) => many > 0);
  const rows = list.selectAll("li").data(present).join("li");
  const buttons = rows.append("button").attr("type", "button").on("click", (_, [role]) => store.set({ role: store.get().role === role ? "" : role }));
  buttons.each(function ([role]) {
    roleMark(select(this), data, role);
  });
  buttons.append("span").attr("class", "name").text(([role]) => role);
  buttons.append("span").attr("class", "many").text(([, many]) => many);
  rows.append("p").text(([role]) => data.rule(role));
  const absent = [...data.roleNames].filter(([role, many]) => many === 0 && role !== MIXED);
  if (absent.length) {
    const none = section.append("details").attr("class", "leftout");
    none.append("summary").text(`Roles no head has (${absent.length})`);
    const rules = none.append("dl");
    for (const [role] of absent) {
      rules.append("dt").text(role);
      rules.append("dd").text(data.rule(role));
    }
  }
  store.watch(["role", "roles"], (state) => {
    buttons.attr("aria-pressed", ([role]) => String(role === state.role));
    toggle.select("input").property("checked", state.roles);
  });
}
