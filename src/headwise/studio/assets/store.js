// The state all views share: question, head, role (one picked out, or ""), roles (marks shown). Kept in the address after "#".

export function createStore(data, first) {
  let state = first;
  const listeners = new Set();
  return {
    get: () => state,
    set(change) {
      const next = allowed(data, { ...state, ...change }, state);
      const changed = new Set(Object.keys(next).filter((key) => next[key] !== state[key]));
      if (!changed.size) return;
      state = next;
      for (const listener of listeners) listener(state, changed);
    },
    // Calls now and after every change of one of the keys.
    watch(keys, listener) {
      listeners.add((now, changed) => keys.some((key) => changed.has(key)) && listener(now, changed));
      listener(state, new Set(keys));
    },
  };
}

export function startState(data, hash) {
  const question = data.payload.questions[0];
  const best = data.ranking(question).order[0]?.place ?? data.heads[0];
  const first = { question: question.name, head: best?.key ?? "", role: "", roles: false };
  return allowed(data, { ...first, ...fromHash(hash) }, first);
}

// A hand-written address may name what is not there: that part is then left as it was.
function allowed(data, state, before = null) {
  const fixed = { ...state };
  if (!data.questions.has(fixed.question)) fixed.question = before?.question ?? data.payload.questions[0].name;
  if (!data.places.has(fixed.head)) fixed.head = before?.head ?? data.heads[0]?.key ?? "";
  if (fixed.role && !data.roleNames.has(fixed.role)) fixed.role = "";
  return fixed;
}

export function toHash(state) {
  const parts = new URLSearchParams({ question: state.question, head: state.head });
  if (state.role) parts.set("role", state.role);
  if (state.roles) parts.set("roles", "1");
  return `#${parts.toString().replaceAll("%3A", ":")}`;
}

export function fromHash(hash) {
  const parts = new URLSearchParams(hash.replace(/^#/, ""));
  const found = {};
  for (const key of ["question", "head"]) if (parts.has(key)) found[key] = parts.get(key);
  if (found.question || found.head) {
    found.role = parts.get("role") ?? "";
    found.roles = parts.get("roles") === "1";
  }
  return found;
}
