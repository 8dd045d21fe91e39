// Where the cells of a grid lie. Layers run across when that leaves room for cells one can hit, else down.

const LEFT = 52, TOP = 31, RIGHT = 4, BOTTOM = 4, WIDEST = 30, EASY = 14, TALLEST = 620;

export function gridShape(stream, width) {
  const layers = stream.layers.map((_, i) => i);
  const heads = Array.from({ length: stream.heads }, (_, i) => i);
  const room = width - LEFT - RIGHT;
  const layersAcross = room / layers.length >= Math.min(EASY, room / heads.length);
  const [columns, rows] = layersAcross ? [layers, heads] : [heads, layers];
  const cellWidth = Math.min(layersAcross ? WIDEST : 40, room / columns.length);
  const cellHeight = Math.max(3, Math.min(cellWidth, layersAcross ? 26 : 18, TALLEST / rows.length));
  const gap = Math.min(cellWidth, cellHeight) >= 7 ? 1 : 0;
  const place = (column, row) => (layersAcross ? { layer: column, head: row } : { layer: row, head: column });
  const spot = ({ layer, head }) => (layersAcross ? [layer, head] : [head, layer]);
  const corner = (at) => {
    const [column, row] = spot(at);
    return { x: LEFT + column * cellWidth, y: TOP + row * cellHeight };
  };
  return {
    columns, rows, place, spot, corner, left: LEFT, top: TOP, cellWidth, cellHeight,
    width: Math.ceil(LEFT + columns.length * cellWidth + RIGHT),
    height: Math.ceil(TOP + rows.length * cellHeight + BOTTOM),
    inner: { width: cellWidth - gap, height: cellHeight - gap },
    short: Math.min(cellWidth, cellHeight),
    centre: (at) => {
      const { x, y } = corner(at);
      return { x: x + (cellWidth - gap) / 2, y: y + (cellHeight - gap) / 2 };
    },
    cells: (row) => columns.map((column) => ({ ...place(column, row), ...corner(place(column, row)) })),
    across: layersAcross ? "layer" : "head",
    down: layersAcross ? "head" : "layer",
    xTicks: ticks(columns, cellWidth, 24).map((i) => ({ at: LEFT + (i + 0.5) * cellWidth, text: layersAcross ? stream.layers[i] : i })),
    yTicks: ticks(rows, cellHeight, 13).map((i) => ({ at: TOP + (i + 0.5) * cellHeight, text: layersAcross ? i : stream.layers[i] })),
  };
}

// The width at which the cells of all streams are easily hit: narrow grids may stand beside each other.
export function naturalWidth(streams) {
  return LEFT + RIGHT + 24 * Math.max(...streams.map((stream) => stream.layers.length));
}

// Every n-th, n a round number, so that labels keep their distance.
function ticks(items, size, least) {
  const every = [1, 2, 5, 10, 20, 50, 100].find((n) => n * size >= least) ?? 200;
  return items.filter((i) => i % every === 0);
}

export function cellAt(shape, [x, y]) {
  const column = Math.floor((x - shape.left) / shape.cellWidth);
  const row = Math.floor((y - shape.top) / shape.cellHeight);
  if (column < 0 || row < 0 || column >= shape.columns.length || row >= shape.rows.length) return null;
  return shape.place(column, row);
}

// The place a key moves to; null for keys that do not move.
export function step(shape, at, key, far) {
  const [column, row] = shape.spot(at);
  const [right, bottom] = [shape.columns.length - 1, shape.rows.length - 1];
  const page = Math.max(1, Math.round(bottom / 4));
  const moved = {
    ArrowLeft: [column - 1, row], ArrowRight: [column + 1, row], ArrowUp: [column, row - 1], ArrowDown: [column, row + 1],
    Home: [0, far ? 0 : row], End: [right, far ? bottom : row], PageUp: [column, row - page], PageDown: [column, row + page],
  }[key];
  if (!moved) return null;
  return shape.place(Math.max(0, Math.min(right, moved[0])), Math.max(0, Math.min(bottom, moved[1])));
}
