// Draws the figures embedded in the page in the page's colours, and wires legends and selectors.
(function () {
  "use strict";

  var coarse = window.matchMedia("(pointer: coarse)").matches;
  var hovers = window.matchMedia("(hover: hover)").matches;
  var dark = window.matchMedia("(prefers-color-scheme: dark)");
  var config = {
    responsive: true, displaylogo: false, scrollZoom: false, displayModeBar: hovers ? "hover" : false
  };

  function colours() {
    var style = getComputedStyle(document.documentElement);
    var read = function (name) { return style.getPropertyValue(name).trim(); };
    return { text: read("--text"), muted: read("--muted"), grid: read("--grid"), card: read("--card") };
  }

  // Everything that depends on light or dark, as dotted keys of the layout.
  function themeOf(layout) {
    var c = colours();
    var theme = {
      "paper_bgcolor": c.card,
      "plot_bgcolor": c.card,
      "font.color": c.text,
      "font.family": getComputedStyle(document.body).fontFamily,
      "hoverlabel.bgcolor": c.card,
      "hoverlabel.bordercolor": c.muted,
      "hoverlabel.font.color": c.text,
      "modebar.bgcolor": c.card,
      "modebar.color": c.muted,
      "modebar.activecolor": c.text
    };
    Object.keys(layout).filter(function (key) { return /^[xy]axis\d*$/.test(key); })
      .forEach(function (key) {
        theme[key + ".gridcolor"] = c.grid;
        theme[key + ".linecolor"] = c.grid;
        theme[key + ".title.font.color"] = c.muted;
      });
    return theme;
  }

  function withTheme(layout) {
    var theme = themeOf(layout);
    Object.keys(theme).forEach(function (path) {
      var parts = path.split(".");
      var last = parts.pop();
      var place = layout;
      parts.forEach(function (part) { place = place[part] = place[part] || {}; });
      place[last] = theme[path];
    });
    // A finger must be able to scroll past a chart.
    if (coarse) { layout.dragmode = false; }
    return layout;
  }

  function draw(chart) {
    var figure = JSON.parse(chart.querySelector(".figure-data").textContent);
    return Plotly.newPlot(chart, figure.data, withTheme(figure.layout), config);
  }

  // A trace is shown if its legend entries are switched on and its selector entry is chosen.
  function refresh(chart) {
    if (!chart.data) { return; }
    var select = chart.closest(".card").querySelector("select");
    var visible = chart.data.map(function (trace) {
      var meta = trace.meta || {};
      var chosen = meta.choice == null || !select || String(meta.choice) === select.value;
      var hidden = meta.series && chart.hiddenSeries && chart.hiddenSeries[meta.series];
      return chosen && !hidden;
    });
    Plotly.restyle(chart, { visible: visible });
  }

  function toggle(chip) {
    var show = chip.getAttribute("aria-pressed") !== "true";
    chip.setAttribute("aria-pressed", String(show));
    chip.closest(".scope").querySelectorAll(".chart").forEach(function (chart) {
      chart.hiddenSeries = chart.hiddenSeries || {};
      chart.hiddenSeries[chip.dataset.series] = !show;
      refresh(chart);
    });
  }

  var charts = Array.from(document.querySelectorAll(".chart"));
  document.querySelectorAll(".chip").forEach(function (chip) {
    chip.addEventListener("click", function () { toggle(chip); });
  });
  document.querySelectorAll(".card select").forEach(function (select) {
    select.addEventListener("change", function () {
      refresh(select.closest(".card").querySelector(".chart"));
    });
  });
  dark.addEventListener("change", function () {
    charts.forEach(function (chart) { Plotly.relayout(chart, themeOf(chart.layout)); });
  });
  Promise.all(charts.map(draw)).then(function () {
    document.body.dataset.charts = String(charts.length);
  });
})();
