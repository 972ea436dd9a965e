"use strict";
// Each chart: choices filter the rows, the rows make the picture and the table, keys and taps go from mark to mark.
const HINT = "Point at a mark, or tap it; or focus the picture and use the arrow keys.";

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function chosen(rows, selects) {
  // Of each choice in turn, what the choices before it leave; a row without a value passes every choice.
  for (const select of selects) {
    const there = new Set(rows.map((row) => row[select.name]));
    for (const option of select.options) option.disabled = option.value !== "" && !there.has(option.value);
    if (select.selectedOptions[0].disabled) select.value = [...select.options].find((option) => !option.disabled).value;
    if (select.value !== "") rows = rows.filter((row) => [select.value, null].includes(row[select.name]));
  }
  return rows;
}

function fill(table, rows, words) {
  const head = document.createElement("tr");
  head.append(...words.map((word) => element("th", word)));
  const body = rows.map((row) => {
    const line = document.createElement("tr");
    line.append(...words.map((word) => element("td", row[word])));
    return line;
  });
  table.replaceChildren(document.createElement("thead"), document.createElement("tbody"));
  table.tHead.append(head);
  table.tBodies[0].append(...body);
}

async function draw(figure) {
  const { columns, rows, words, spec } = JSON.parse(figure.querySelector("script").textContent);
  const all = rows.map((row, id) => ({ id, ...Object.fromEntries(columns.map((name, i) => [name, row[i]])) }));
  const filters = [...figure.querySelectorAll("select:not([data-signal])")];
  const signals = [...figure.querySelectorAll("select[data-signal]")];
  const [picture, readout, table] = [".picture", ".readout", "table"].map((name) => figure.querySelector(name));
  let shown = chosen(all, filters);
  let at = -1;
  figure.hidden = false;
  const { view } = await vegaEmbed(picture, { ...spec, datasets: { rows: shown } }, {
    actions: false, ast: true, defaultStyle: false, renderer: "svg", tooltip: { disableDefaultStyle: true },
  });

  function go(to) {
    at = Math.min(to, shown.length - 1);
    const row = shown[at];
    readout.textContent = row ? words.map((word) => `${word} ${row[word]}`).join(" · ") : HINT;
    view.signal("at", row ? row.id : -1).runAsync();
  }

  function update() {
    shown = chosen(all, filters);
    for (const select of signals) view.signal(select.name, select.value);
    if (spec.usermeta) view.height(spec.usermeta.step * new Set(shown.map((row) => row.network)).size);
    view.data("rows", shown);
    fill(table, shown, words);
    figure.querySelector(".count").textContent = `${shown.length} rows`;
    go(-1);
  }

  for (const select of [...filters, ...signals]) select.addEventListener("change", update);
  picture.addEventListener("keydown", (event) => {
    const keys = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: Infinity };
    if (event.key === "Escape") go(-1);
    else if (event.key in keys) go(Math.max(keys[event.key], 0));
    else return;
    event.preventDefault();
  });
  view.addEventListener("click", (event, item) => {
    if (item?.datum?.id !== undefined) go(shown.findIndex((row) => row.id === item.datum.id));
  });
  figure.querySelector(".save").addEventListener("click", async () => {
    const link = element("a", "");
    link.href = `data:image/svg+xml,${encodeURIComponent(await view.toSVG())}`;
    link.download = `${figure.id}.svg`;
    link.click();
  });
  update();
}

for (const figure of document.querySelectorAll("figure.chart")) draw(figure);
