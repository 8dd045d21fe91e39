// Light or dark: what the system says, until the reader chooses.
const KEY = "headwise-theme";
const system = window.matchMedia("(prefers-color-scheme: dark)");

export function createTheme(root) {
  const listeners = new Set();
  let chosen = remembered();
  let printing = false;
  const now = () => (printing ? "light" : (chosen ?? (system.matches ? "dark" : "light")));
  const apply = () => {
    root.dataset.theme = now();
    document.documentElement.style.colorScheme = now();
    for (const listener of listeners) listener(now());
  };
  system.addEventListener("change", apply);
  for (const [event, state] of [["beforeprint", true], ["afterprint", false]])
    window.addEventListener(event, () => {
      printing = state;
      apply();
    });
  apply();
  return {
    get: now,
    toggle() {
      chosen = now() === "dark" ? "light" : "dark";
      remember(chosen);
      apply();
    },
    watch: (listener) => listeners.add(listener),
  };
}

// Browsers may refuse storage to a local file: the choice then lasts as long as the page.
function remembered() {
  try {
    const theme = window.localStorage.getItem(KEY);
    return theme === "dark" || theme === "light" ? theme : null;
  } catch {
    return null;
  }
}

function remember(theme) {
  try {
    window.localStorage.setItem(KEY, theme);
  } catch {
    return;
  }
}
