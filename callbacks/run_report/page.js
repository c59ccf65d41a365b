// Draws FIGURES, what each place on the page shows, in the colours of the reader's theme.
const touch = matchMedia("(pointer: coarse)").matches;
const places = (selector) => [...document.querySelectorAll(selector)];
const drawn = new Set();

function themed() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  return {
    "font.color": colour("--soft"),
    "font.family": getComputedStyle(document.body).fontFamily,
    "hoverlabel.bgcolor": colour("--card"),
    "hoverlabel.bordercolor": colour("--line"),
    "hoverlabel.font.color": colour("--ink"),
  };
}

function draw(id) {
  const { data, layout } = FIGURES[id];
  if (touch) layout.dragmode = false; // a finger scrolls the page
  drawn.add(id);
  const config = { responsive: true, displayModeBar: false };
  return Plotly.newPlot(id, data, layout, config).then(() => Plotly.relayout(id, themed()));
}

function show(number) {
  places(".map").forEach((map, i) => {
    map.hidden = i !== number;
    const { id } = map.querySelector(".plot");
    if (i === number) drawn.has(id) ? Plotly.Plots.resize(id) : draw(id);
  });
}

const visible = places(".plot").filter((place) => !place.closest("[hidden]"));
Promise.all(visible.map((place) => draw(place.id))).then(
  () => { document.body.dataset.drawn = drawn.size; },
  (error) => { document.body.dataset.failed = error; },
);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  drawn.forEach((id) => Plotly.relayout(id, themed()));
});
document.getElementById("choice")?.addEventListener("change", (event) => {
  show(Number(event.target.value));
});
