export { bin, extent, max, range } from "d3-array";
export { lab } from "d3-color";
export { format } from "d3-format";
export { interpolateBasis } from "d3-interpolate";
export { scaleBand, scaleLinear } from "d3-scale";
export { pointer, select } from "d3-selection";
