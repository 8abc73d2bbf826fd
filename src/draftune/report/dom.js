"use strict";

const SVG = "http://www.w3.org/2000/svg";

// Sets attributes one by one and adds text as text nodes: data are never parsed as HTML.
function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

const make = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
const draw = (name, attributes = {}, ...children) => fill(document.createElementNS(SVG, name), attributes, children);
const find = (id) => document.getElementById(id);

// A number with four significant digits.
function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1000) return grouped(value, 0);
  if (size !== 0 && size < 0.0001) return minus(Number(value.toPrecision(3)).toExponential());
  return minus(String(Number(value.toPrecision(4))));
}

const grouped = (value, digits) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }).replace("-", "−");
const minus = (text) => text.replace("-", "−");

const nearest = (values, target) =>
  values.reduce((best, value, i) => (Math.abs(value - target) < Math.abs(values[best] - target) ? i : best), 0);
