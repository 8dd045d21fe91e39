// The model, what was read, when and by what command.
import { select } from "./vendor/d3.js";
import { count, plural } from "./data.js";

export function headerView(parent, data, theme) {
  const { model, created, tokens, command } = data.payload;
  const header = select(parent).append("header").attr("class", "top");
  const line = header.append("div").attr("class", "brand");
  line.append("span").attr("class", "wordmark").text("headwise");
  themeButton(line, theme);
  header.append("h1").text(model.name);
  if (command) commandLine(header, command);

  const layers = data.streams.map((stream) => `${data.streams.length > 1 ? `${stream.name} ` : ""}${stream.layers.length} × ${stream.heads}`);
  const facts = [
    ["layers × heads", layers.join(", ")],
    ["heads", count(data.heads.length)],
    ["parameters", model.parameters === null ? "" : count(model.parameters)],
    ["read", tokens === null ? "" : plural(tokens, "token")],
    ["made", date(created)],
    ["weights", model.fingerprint],
    ["headwise", model.headwise],
  ].filter(([, value]) => value);
  const list = header.append("dl").attr("class", "facts");
  for (const [name, value] of facts) {
    const pair = list.append("div");
    pair.append("dt").text(name);
    pair.append("dd").text(value);
  }
}

function themeButton(line, theme) {
  const button = line.append("button").attr("type", "button").attr("class", "plain theme").on("click", theme.toggle);
  const name = () => button.text(theme.get() === "dark" ? "Light" : "Dark").attr("aria-label", `Use ${theme.get() === "dark" ? "light" : "dark"} colours`);
  theme.watch(name);
  name();
}

function commandLine(header, command) {
  const line = header.append("div").attr("class", "command");
  line.append("code").text(command);
  if (!navigator.clipboard) return;
  const button = line.append("button").attr("type", "button").attr("class", "plain").text("Copy").attr("aria-label", "Copy the command");
  button.on("click", async () => {
    const copied = await navigator.clipboard.writeText(command).then(() => true, () => false);
    button.text(copied ? "Copied" : "Copy by hand");
  });
}

function date(text) {
  const when = new Date(text);
  if (Number.isNaN(when.getTime())) return text;
  return when.toLocaleString("en-GB", { day: "numeric", month: "short", year: "numeric", hour: "2-digit", minute: "2-digit" });
}
