export { bin, extent, max, min, range, ticks } from "d3-array";
export { lab } from "d3-color";
export { format } from "d3-format";
export { interpolateLab } from "d3-interpolate";
export { scaleBand, scaleLinear } from "d3-scale";
export { pointer, select, selectAll } from "d3-selection";
