"use strict";
// Turns the chart data of the page into plotly figures, in the colours of the current theme.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const charts = new Map(data.charts.map((chart) => [chart.id, chart]));
  const chosenAxis = new Map();
  const touch = matchMedia("(pointer: coarse)").matches;
  const html = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  function color(name) {
    return name.startsWith("#") ? name : getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  }

  function lineTrace(line, axis, chart) {
    const last = line.y.length - 1;
    const labelled = line.end_label !== "";
    return {
      type: "scatter", x: line.xs[axis], y: line.y, name: html(line.name), connectgaps: false, cliponaxis: !labelled,
      mode: "lines" + (line.markers ? "+markers" : "") + (labelled ? "+text" : ""),
      line: { color: color(line.color), width: line.width, dash: line.dash }, opacity: line.opacity,
      marker: { size: line.markers ? (line.width > 2 ? 7 : 4) : 0, color: color(line.color) },
      text: labelled ? line.y.map((_, i) => (i === last ? "<b>" + html(line.end_label) + "</b>" : "")) : undefined,
      textposition: line.end_above ? "top center" : "bottom center",
      textfont: { color: color(line.color), size: 14 },
      hoverinfo: line.hover ? undefined : "skip",
      hovertemplate: line.hover ? "%{y:" + chart.y_format + "}<extra>" + html(line.name) + "</extra>" : undefined,
    };
  }

  function heatTrace(heat) {
    return {
      type: "heatmap", z: heat.z, x: heat.x, y: heat.y, zmin: 0, zmax: 2, xgap: 2, ygap: 2, showscale: false,
      colorscale: [[0, color("dense")], [0.5, color("middle")], [1, color("moe")]],
      hovertemplate: "layer %{y}, expert %{x}<br>%{z:.2f} × the fair share<extra></extra>",
    };
  }

  function layout(chart, axis) {
    const text = { family: getComputedStyle(document.body).fontFamily, color: color("muted"), size: 12 };
    const lines = { gridcolor: color("grid"), linecolor: color("line"), zerolinecolor: color("line"), automargin: true };
    const base = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: text, showlegend: false,
      hoverlabel: { bgcolor: color("surface"), bordercolor: color("line"), font: { ...text, color: color("text") }, namelength: 30 },
      dragmode: touch ? false : "zoom", modebar: { bgcolor: "rgba(0,0,0,0)", color: color("muted"), activecolor: color("text") },
    };
    if (chart.lines.length === 0) {
      return {
        ...base, margin: { l: 8, r: 4, t: 4, b: 8 },
        xaxis: { type: "category", title: { text: "expert", standoff: 4 }, automargin: true, showgrid: false, ticks: "", fixedrange: true },
        yaxis: { type: "category", title: { text: "layer", standoff: 6 }, automargin: true, showgrid: false, autorange: "reversed", ticks: "", fixedrange: true },
      };
    }
    const compute = chart.axes[axis] === "flops";
    const few = chart.lines.filter((line) => line.hover).length <= 10;
    const labelled = chart.lines.some((line) => line.end_label !== "");
    const values = chart.lines.flatMap((line) => line.y).filter((y) => y !== null);
    const high = Math.max(...values), low = Math.min(...values, chart.from_zero ? 0 : Infinity);
    const room = (high - low || Math.abs(high) || 1) * (labelled ? 0.12 : 0.06);
    return {
      ...base, margin: { l: 8, r: labelled ? 30 : 10, t: labelled ? 22 : 8, b: 8 }, hovermode: few ? "x unified" : "closest",
      xaxis: {
        ...lines, title: { text: data.axes[chart.axes[axis]], standoff: 8 }, showgrid: false, rangemode: "tozero", zeroline: false,
        exponentformat: compute ? "power" : "B", hoverformat: compute ? ".3~g" : ".4~s", nticks: 8,
      },
      yaxis: {
        ...lines, title: { text: html(chart.y_title), standoff: 10 }, tickformat: chart.y_format.replace(".2f", ".2~f"), nticks: 7,
        zeroline: false, linecolor: "rgba(0,0,0,0)", ticks: "outside", ticklen: 6, tickcolor: "rgba(0,0,0,0)",
        range: [chart.from_zero && low === 0 ? 0 : low - room, high + (labelled ? room / 2 : room)],
      },
    };
  }

  function draw(chart) {
    const target = document.getElementById("plot-" + chart.id);
    if (!target) return;
    const axis = chosenAxis.get(chart.id) || 0;
    const traces = chart.lines.length ? chart.lines.map((line) => lineTrace(line, axis, chart)) : [heatTrace(chart.heat)];
    const config = {
      responsive: true, displaylogo: false, displayModeBar: !touch, scrollZoom: false,
      modeBarButtons: [chart.lines.length ? ["resetScale2d", "toImage"] : ["toImage"]],
      toImageButtonOptions: { filename: "skymoe-" + chart.id, scale: 2 },
    };
    Plotly.react(target, traces, layout(chart, axis), config);
  }

  function drawAll() { charts.forEach(draw); }

  document.querySelectorAll(".switch").forEach((group) => {
    group.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      group.querySelectorAll("button").forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
      chosenAxis.set(group.dataset.for, Number(button.dataset.axis));
      draw(charts.get(group.dataset.for));
    });
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  drawAll();
})();
