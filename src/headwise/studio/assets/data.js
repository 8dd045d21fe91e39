// What the views ask of a payload: places of heads, scores, ranks, words. No drawing.
import { extent, format } from "./vendor/d3.js";

const small = format(".3f"), middle = format(".2f"), large = format(",.0f"), many = format(".3~s");

export function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  return (size < 10 ? small : size < 1000 ? middle : large)(value).replace("-", "−");
}

export function count(value) {
  return value < 10000 ? format(",")(value) : many(value).replace("G", "B");
}

export function plural(amount, word) {
  return `${format(",")(amount)} ${word}${amount === 1 ? "" : "s"}`;
}

export function placeKey(stream, layer, head) {
  return `${stream}:${layer}:${head}`;
}

// Names come from outside: one of them may be "constructor".
function own(object, key) {
  return Object.hasOwn(object, key) ? object[key] : undefined;
}

export class Data {
  constructor(payload) {
    this.payload = payload;
    this.streams = payload.streams;
    this.questions = new Map(payload.questions.map((question) => [question.name, question]));
    this.heads = [];
    for (const stream of payload.streams)
      stream.layers.forEach((number, layer) => {
        for (let head = 0; head < stream.heads; head++)
          if (this.exists(stream.name, layer, head))
            this.heads.push({ key: placeKey(stream.name, layer, head), stream: stream.name, layer, head });
      });
    this.places = new Map(this.heads.map((place) => [place.key, place]));
    this.roleNames = this.countRoles();
    this.rankings = new Map();
    this.groups = this.groupColumns();
  }

  // The columns of one question stand together, in the order in which the questions come.
  groupColumns() {
    const groups = new Map();
    for (const column of this.payload.questions) {
      const name = column.question || column.name;
      if (!groups.has(name)) groups.set(name, { name, columns: [] });
      groups.get(name).columns.push(column);
    }
    return [...groups.values()];
  }

  // A head is there when it has a role, or a score for any question.
  exists(stream, layer, head) {
    if (this.role({ stream, layer, head })) return true;
    return this.payload.questions.some((question) => (question.grid[stream]?.[layer]?.[head] ?? null) !== null);
  }

  score(question, place) {
    return question.grid[place.stream]?.[place.layer]?.[place.head] ?? null;
  }

  sem(question, place) {
    return question.sem?.[place.stream]?.[place.layer]?.[place.head] ?? null;
  }

  role(place) {
    return this.payload.roles[place.stream]?.[place.layer]?.[place.head] ?? null;
  }

  rule(role) {
    return own(this.payload.role_rules, role) ?? "";
  }

  detail(key) {
    return own(this.payload.details, key) ?? null;
  }

  rows(key) {
    return own(this.payload.sample?.rows ?? {}, key) ?? null;
  }

  // The number of a layer as the model counts it, which need not be its place in the grid.
  layerNumber(place) {
    return this.streams.find((stream) => stream.name === place.stream).layers[place.layer];
  }

  label(place) {
    const words = `L${this.layerNumber(place)}.H${place.head}`;
    return this.streams.length > 1 ? `${place.stream} ${words}` : words;
  }

  spoken(place) {
    const words = `layer ${this.layerNumber(place)}, head ${place.head}`;
    return this.streams.length > 1 ? `${place.stream}, ${words}` : words;
  }

  title(question) {
    return question.title || question.name;
  }

  // All scored heads of a question, the highest first, and the rank of each.
  ranking(question) {
    if (!this.rankings.has(question.name)) {
      const order = this.heads
        .map((place) => ({ place, score: this.score(question, place) }))
        .filter((entry) => entry.score !== null)
        .sort((a, b) => b.score - a.score);
      const ranks = new Map(order.map((entry, index) => [entry.place.key, index + 1]));
      const [low, high] = extent(order, (entry) => entry.score);
      this.rankings.set(question.name, { order, ranks, low: low ?? 0, high: high ?? 0 });
    }
    return this.rankings.get(question.name);
  }

  countRoles() {
    const counts = new Map(Object.keys(this.payload.role_rules).map((role) => [role, 0]));
    for (const place of this.heads) {
      const role = this.role(place);
      if (role) counts.set(role, (counts.get(role) ?? 0) + 1);
    }
    return counts;
  }
}
