// Draws the charts of the report from the data in the page, and answers its controls. Nothing is loaded.
(function () {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const still = window.matchMedia("(prefers-reduced-motion: reduce)");
  const drawn = new Map(); // element -> {chart, spec}
  let printing = false;
  document.documentElement.classList.add("js");

  // ---- numbers with units -----------------------------------------------------------------------------------------

  const digits = (value, places) => Number(value.toPrecision(places)).toLocaleString("en", {maximumFractionDigits: 12});

  function seconds(value) {
    const size = Math.abs(value);
    if (value === 0) return "0";
    if (size < 1e-6) return digits(value * 1e9, 3) + " ns";
    if (size < 1e-3) return digits(value * 1e6, 3) + " µs";
    if (size < 1) return digits(value * 1e3, 3) + " ms";
    if (size < 120) return digits(value, 3) + " s";
    return digits(value / 60, 3) + " min";
  }

  function bytes(value) {
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let place = 0;
    while (Math.abs(value) >= 1024 && place < units.length - 1) { value /= 1024; place += 1; }
    return digits(value, 3) + " " + units[place];
  }

  function short(value) {
    const size = Math.abs(value);
    for (const [unit, factor] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e4]]) {
      if (size >= factor) return digits(value / (unit === "k" ? 1e3 : factor), 3) + " " + unit;
    }
    return digits(value, 4);
  }

  const units = {seconds, bytes, number: short};

  // Steps of an axis of bytes are round in binary units.
  function byteStep(most) {
    let step = Math.pow(2, Math.ceil(Math.log2(most / 6)));
    return Math.max(step, 1);
  }

  function escaped(text) {
    return String(text).replace(/[&<>"']/g, (c) => "&#" + c.charCodeAt(0) + ";");
  }

  // ---- what all charts share --------------------------------------------------------------------------------------

  function colours() {
    const night = dark.matches && !printing;
    return night
      ? {ink: "#e8eef3", soft: "#9fb0bd", line: "#2b3a46", card: "#17212a"}
      : {ink: "#16202a", soft: "#566573", line: "#dce3e9", card: "#ffffff"};
  }

  function base(c) {
    return {
      animation: false,
      aria: {enabled: false}, // each chart has its sentence as aria-label and its numbers as a table
      textStyle: {color: c.ink, fontFamily: getComputedStyle(document.body).fontFamily, fontSize: 12},
      tooltip: {
        confine: true, backgroundColor: c.card, borderColor: c.line, textStyle: {color: c.ink, fontSize: 12},
        extraCssText: "max-width:320px;white-space:normal;",
      },
    };
  }

  function axis(c, more) {
    return Object.assign({
      axisLine: {lineStyle: {color: c.line}}, axisTick: {lineStyle: {color: c.line}},
      axisLabel: {color: c.soft, hideOverlap: true}, splitLine: {lineStyle: {color: c.line}},
      nameTextStyle: {color: c.soft}, nameLocation: "middle", nameGap: 30,
    }, more);
  }

  const hatch = {symbol: "rect", dashArrayX: [1, 0], dashArrayY: [2, 5], rotation: -Math.PI / 4, color: "rgba(0,0,0,.28)"};
  const legend = (c, names) => ({
    data: names, type: "plain", top: 0, left: 0, itemWidth: 14, itemHeight: 10, itemGap: 12, textStyle: {color: c.ink},
  });

  // Rows that a legend of these names takes in a chart of this width.
  function legendHeight(names, width) {
    let rows = 1, used = 0;
    for (const name of names) {
      const need = 34 + 7 * name.length;
      if (used && used + need > width) { rows += 1; used = 0; }
      used += need;
    }
    return rows * 24;
  }

  function cut(text, length) {
    return text.length > length ? text.slice(0, length - 1) + "…" : text;
  }

  // ---- stacked bars -----------------------------------------------------------------------------------------------

  function bars(spec, width) {
    const c = colours(), unit = units[spec.unit], narrow = width < 560;
    const names = spec.series.map((each) => each.name), top = legendHeight(names, width) + 8;
    const high = narrow ? 46 : 30;
    const totals = spec.categories.map((_, n) => spec.series.reduce((sum, each) => sum + each.values[n], 0));
    const most = Math.max(...totals, ...(spec.limits || []).map((each) => each.value), ...(spec.ranges || []).map((r) => r[2]));
    const series = spec.series.map((each) => ({
      name: each.name, type: "bar", stack: "all", data: each.values, barMaxWidth: narrow ? 14 : 18, barCategoryGap: "30%",
      itemStyle: {color: each.color, borderColor: c.card, borderWidth: .5, decal: each.hatched ? hatch : undefined},
      emphasis: {disabled: true},
    }));
    if (series.length && spec.limits && spec.limits.length) {
      series[0].markLine = {
        silent: true, symbol: "none", lineStyle: {color: c.ink, type: "dashed"},
        data: spec.limits.map((each) => ({
          xAxis: each.value,
          label: {formatter: each.name + " " + unit(each.value), color: c.ink, position: "start", distance: 4, fontSize: 11},
        })).slice(-1),
      };
    }
    if (spec.ranges && spec.ranges.length) {
      series.push({
        type: "custom", name: "", silent: true, data: spec.ranges, encode: {x: [1, 2], y: 0}, z: 5,
        renderItem: (_, api) => {
          const from = api.coord([api.value(1), api.value(0)]), to = api.coord([api.value(2), api.value(0)]), y = from[1];
          const style = {stroke: c.ink, lineWidth: 1.3};
          const line = (x1, y1, x2, y2) => ({type: "line", shape: {x1, y1, x2, y2}, style});
          return {type: "group", children: [
            line(from[0], y, to[0], y), line(from[0], y - 4, from[0], y + 4), line(to[0], y - 4, to[0], y + 4)]};
        },
      });
    }
    const left = narrow ? 8 : 20 + 6.6 * Math.min(36, Math.max(...spec.categories.map((each) => each.length)));
    return {
      height: top + 54 + high * spec.categories.length + (spec.limits && spec.limits.length ? 6 : 0),
      option: Object.assign(base(c), {
        legend: legend(c, names),
        grid: {top, left, right: 28, bottom: 50},
        xAxis: axis(c, {
          type: "value", name: spec.axis, max: most * 1.02, axisLabel: {color: c.soft, formatter: unit, hideOverlap: true, showMaxLabel: false},
          interval: spec.unit === "bytes" ? byteStep(most) : undefined, splitNumber: narrow ? 3 : 6,
        }),
        yAxis: axis(c, {
          type: "category", data: spec.categories, inverse: true, splitLine: {show: false}, axisTick: {show: false},
          axisLabel: narrow
            ? {color: c.ink, inside: true, margin: 0, padding: [0, 0, 11, 2], align: "left", verticalAlign: "bottom", formatter: (text) => cut(text, 46), interval: 0}
            : {color: c.ink, formatter: (text) => cut(text, 36), interval: 0},
          z: narrow ? 3 : 0,
        }),
        tooltip: Object.assign(base(c).tooltip, {
          trigger: "axis", axisPointer: {type: "shadow"},
          formatter: (found) => {
            const place = found[0].dataIndex;
            const lines = spec.series.filter((each) => each.values[place] > 0)
              .map((each) => `<i style="background:${each.color};display:inline-block;width:9px;height:9px"></i> ` +
                `${escaped(each.name)}: ${unit(each.values[place])} (${Math.round(100 * each.values[place] / totals[place])}%)`);
            return `<b>${escaped(spec.categories[place])}</b>: ${unit(totals[place])}<br>${lines.join("<br>")}`;
          },
        }),
        series,
      }),
    };
  }

  // ---- lines ------------------------------------------------------------------------------------------------------

  function lines(spec, width) {
    const c = colours(), unit = units[spec.unit], narrow = width < 560;
    const names = spec.series.map((each) => each.name), top = legendHeight(names, width) + (spec.marks && spec.marks.length ? 22 : 14);
    const series = spec.series.map((each, place) => ({
      name: each.name, type: each.line === false ? "scatter" : "line", data: each.points, connectNulls: false,
      showSymbol: Boolean(spec.dots) || each.points.length < 3, symbolSize: each.line === false ? 11 : 7,
      symbol: ["circle", "rect", "triangle", "diamond"][place % 4], sampling: "none",
      lineStyle: {width: Math.max(2, 2 + 2 * (Math.min(6, spec.series.length) - 1 - place)), type: each.dash ? "dashed" : ["solid", "dashed", "dotted"][Math.floor(place / 4) % 3]},
      itemStyle: {color: each.color}, emphasis: {focus: "series"},
    }));
    if (series.length && spec.marks && spec.marks.length) {
      series[0].markLine = {
        silent: true, symbol: "none", lineStyle: {color: c.ink, type: "dashed"},
        data: spec.marks.map((each) => ({xAxis: each.x, label: {formatter: each.name, color: c.ink, position: "end", rotate: 0, fontSize: 11}})),
      };
    }
    const x = {type: spec.log ? "log" : "value", logBase: 2, name: spec.x, min: "dataMin", max: "dataMax", splitLine: {show: false}};
    if (spec.log) x.axisLabel = {color: c.soft, formatter: (value) => digits(value, 6)};
    const y = {type: spec.log ? "log" : "value", logBase: 10, name: spec.y, nameGap: 54, scale: true, axisLabel: {color: c.soft, formatter: unit, hideOverlap: true}};
    if (spec.log) { y.logBase = 2; }
    return {
      height: (narrow ? 270 : 320) + top,
      option: Object.assign(base(c), {
        legend: legend(c, names),
        grid: {top, left: 74, right: 26, bottom: 48},
        xAxis: axis(c, x), yAxis: axis(c, y),
        tooltip: Object.assign(base(c).tooltip, {
          trigger: "axis",
          formatter: (found) => `<b>${escaped(spec.x)} ${digits(found[0].value[0], 8)}</b><br>` + found
            .filter((each) => each.value[1] !== null && each.value[1] !== undefined)
            .map((each) => `${each.marker} ${escaped(each.seriesName)}: ${spec.unit === "number" ? digits(each.value[1], 6) : unit(each.value[1])}`).join("<br>"),
        }),
        series,
      }),
    };
  }

  function scatter(spec, width) {
    const c = colours();
    const names = spec.series.map((each) => each.name), top = legendHeight(names, width) + 14;
    const all = spec.series.flatMap((each) => each.points.flat());
    const ends = [Math.min(...all), Math.max(...all)];
    const series = spec.series.map((each, place) => ({
      name: each.name, type: "scatter", data: each.points, symbolSize: 8, itemStyle: {color: each.color, opacity: .75},
      symbol: ["circle", "rect", "triangle", "diamond"][Math.floor(place / 5) % 4],
    }));
    series.push({
      type: "line", name: "", data: [[ends[0], ends[0]], [ends[1], ends[1]]], showSymbol: false, silent: true,
      lineStyle: {color: c.soft, type: "dashed", width: 1}, tooltip: {show: false},
    });
    const side = (name, gap) => axis(c, {type: "log", name, nameGap: gap, axisLabel: {color: c.soft, formatter: seconds, hideOverlap: true}});
    return {
      height: 430 + top,
      option: Object.assign(base(c), {
        legend: legend(c, names), grid: {top, left: 74, right: 26, bottom: 48},
        xAxis: side(spec.x, 30), yAxis: side(spec.y, 54),
        tooltip: Object.assign(base(c).tooltip, {
          formatter: (found) => `${escaped(found.seriesName)}<br>measured ${seconds(found.value[0])}, predicted ${seconds(found.value[1])}`,
        }),
        series,
      }),
    };
  }

  // ---- heat map ---------------------------------------------------------------------------------------------------

  function heat(spec, width) {
    const c = colours();
    const values = spec.cells.map((cell) => cell[2]).sort((a, b) => a - b);
    const low = values[0], high = values[Math.floor((values.length - 1) * .995)];
    const row = Math.max(6, Math.min(26, 420 / spec.rows.length));
    return {
      canvas: spec.cells.length > 2500,
      height: 96 + row * spec.rows.length,
      option: Object.assign(base(c), {
        grid: {top: 42, left: 70, right: 16, bottom: 48},
        xAxis: axis(c, {type: "category", data: spec.columns, name: "optimizer step", splitLine: {show: false}}),
        yAxis: axis(c, {type: "category", data: spec.rows, inverse: true, splitLine: {show: false}, axisTick: {show: false}}),
        visualMap: {
          min: low, max: high > low ? high : low * 1.01 + 1e-12, calculable: false, orient: "horizontal", top: 0, left: 0,
          itemWidth: 12, itemHeight: 140, text: [seconds(high), spec.name + "  " + seconds(low)], textStyle: {color: c.soft},
          inRange: {color: ["#fdf4d8", "#f3c667", "#e07b39", "#a63a50", "#4b1d52"]},
        },
        tooltip: Object.assign(base(c).tooltip, {
          formatter: (found) => `${escaped(spec.rows[found.value[1]])}, step ${escaped(spec.columns[found.value[0]])}: ${seconds(found.value[2])}`,
        }),
        series: [{type: "heatmap", data: spec.cells, itemStyle: {borderColor: c.card, borderWidth: spec.cells.length > 2500 ? 0 : 1}}],
      }),
    };
  }

  // ---- timeline ---------------------------------------------------------------------------------------------------

  function timeline(spec, width) {
    const c = colours(), names = spec.kinds.map((kind) => kind.name), top = legendHeight(names, width) + 26;
    const row = spec.ranks.length <= 8 ? 44 : spec.ranks.length <= 24 ? 24 : 13;
    const left = width < 560 ? 52 : 64;
    const events = spec.events;
    const series = spec.kinds.map((kind, number) => ({
      name: kind.name, type: "custom", itemStyle: {color: kind.color}, clip: true, progressive: 0, animation: false,
      dimensions: ["rank", "lane", "kind", "name", "begin", "length"], encode: {x: [4], y: 0},
      data: events.filter((event) => event[2] === number),
      renderItem: (params, api) => {
        const begin = api.value(4), from = api.coord([begin, api.value(0)]), to = api.coord([begin + api.value(5), api.value(0)]);
        const area = params.coordSys, x = Math.max(from[0], area.x), end = Math.min(to[0], area.x + area.width);
        if (end <= x && (to[0] < area.x || from[0] > area.x + area.width)) return undefined;
        const band = api.size([0, 1])[1] * .84, lane = api.value(1), high = lane ? band * .36 : band * .58;
        const y = from[1] - band / 2 + (lane ? band * .62 : 0), wide = Math.max(end - x, .6);
        const stroke = wide > 3 ? c.card : undefined;
        return {type: "rect", shape: {x, y, width: wide, height: high}, style: {fill: kind.color, stroke, lineWidth: stroke ? .6 : 0}};
      },
    }));
    const start = 0;
    return {
      canvas: events.length > 1200,
      height: top + 78 + row * spec.ranks.length,
      option: Object.assign(base(c), {
        title: {text: spec.name, left: 0, top: top - 24, textStyle: {fontSize: 13, color: c.ink, fontWeight: 600}},
        legend: legend(c, names),
        grid: {top, left, right: 20, bottom: 74},
        xAxis: axis(c, {
          type: "value", min: 0, max: spec.span, name: "time since the step began",
          axisLabel: {color: c.soft, formatter: (value) => seconds(value * 1e-9), hideOverlap: true, showMaxLabel: false}, splitNumber: width < 560 ? 3 : 8,
        }),
        yAxis: axis(c, {type: "category", data: spec.ranks, inverse: true, splitLine: {show: false}, axisTick: {show: false}}),
        dataZoom: [{
          type: "slider", xAxisIndex: 0, filterMode: "none", height: 16, bottom: 8, start, end: 100, brushSelect: false,
          labelFormatter: (value) => seconds(value * 1e-9), borderColor: c.line, textStyle: {color: c.soft}, showDataShadow: false,
        }],
        tooltip: Object.assign(base(c).tooltip, {
          formatter: (found) => {
            const [rank, , kind, name, begin, length] = found.value;
            return `<b>${escaped(spec.names[name])}</b><br>${escaped(spec.kinds[kind].name)}, ${escaped(spec.processes[rank] || spec.ranks[rank])}` +
              `<br>${seconds(length * 1e-9)}, from ${seconds(begin * 1e-9)} on`;
          },
        }),
        series,
      }),
    };
  }

  // Keys of a timeline: + and - look closer and farther, the arrows move.
  function keys(element, chart) {
    element.addEventListener("keydown", (event) => {
      const zoom = chart.getOption().dataZoom[0], wide = zoom.end - zoom.start, middle = (zoom.start + zoom.end) / 2;
      const moves = {"+": [middle - wide / 4, wide / 2], "=": [middle - wide / 4, wide / 2], "-": [middle - wide, wide * 2],
        "ArrowLeft": [zoom.start - wide / 5, wide], "ArrowRight": [zoom.start + wide / 5, wide], "0": [0, 100]};
      if (!moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      const size = Math.min(100, moves[event.key][1]), start = Math.min(Math.max(0, moves[event.key][0]), 100 - size);
      chart.dispatchAction({type: "dataZoom", start, end: start + size});
    });
  }

  // ---- drawing ----------------------------------------------------------------------------------------------------

  const makers = {bars, lines, scatter, heat, timeline};

  function draw(element) {
    const spec = data.charts[Number(element.dataset.chart)], make = makers[spec.kind];
    element.dataset.kind = spec.kind;
    if (!make) return;
    const width = element.clientWidth;
    if (!width) return;
    const made = make(spec, width);
    element.style.height = made.height + "px";
    let known = drawn.get(element);
    if (!known) {
      const chart = echarts.init(element, null, {renderer: made.canvas ? "canvas" : "svg", height: made.height, width});
      known = {chart, width: 0};
      drawn.set(element, known);
      if (spec.kind === "timeline") { chart.group = element.closest(".view").id; keys(element, chart); }
    }
    known.width = width;
    known.chart.resize({width, height: made.height});
    known.chart.setOption(made.option, true);
    element.dataset.drawn = "yes";
  }

  function redraw() {
    for (const element of drawn.keys()) if (element.clientWidth) draw(element);
  }

  const charts = Array.from(document.querySelectorAll(".chart"));
  const near = "IntersectionObserver" in window ? new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting && !drawn.has(entry.target)) draw(entry.target);
  }, {rootMargin: "400px"}) : null;
  for (const element of charts) {
    element.dataset.kind = data.charts[Number(element.dataset.chart)].kind;
    if (near) near.observe(element); else draw(element);
  }
  const drawAll = () => charts.forEach((element) => { if (!drawn.has(element)) draw(element); });
  window.shardwise = {drawAll};

  let waiting = 0;
  window.addEventListener("resize", () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => {
      for (const [element, known] of drawn) if (element.clientWidth && element.clientWidth !== known.width) draw(element);
    });
  });
  dark.addEventListener("change", redraw);
  window.addEventListener("beforeprint", () => { printing = true; drawAll(); redraw(); });
  window.addEventListener("afterprint", () => { printing = false; redraw(); });

  // ---- views, tables ----------------------------------------------------------------------------------------------

  for (const chooser of document.querySelectorAll("select.choose")) {
    const show = () => {
      document.querySelectorAll(`#${chooser.dataset.panel} > .view`).forEach((view, number) => {
        view.hidden = String(number) !== chooser.value;
        if (!view.hidden) view.querySelectorAll(".chart").forEach((element) => draw(element));
      });
    };
    chooser.addEventListener("change", show);
    document.querySelectorAll(`#${chooser.dataset.panel} > .view`).forEach((view, number) => { view.hidden = String(number) !== chooser.value; });
  }

  function save(name, content, type) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([content], {type}));
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
  }

  for (const table of document.querySelectorAll("table")) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "csv";
    button.textContent = "Download as CSV";
    button.addEventListener("click", () => {
      const cell = (each) => /[",\n]/.test(each.textContent) ? `"${each.textContent.replace(/"/g, '""')}"` : each.textContent;
      const rows = Array.from(table.rows).map((row) => Array.from(row.cells).map(cell).join(","));
      save((table.caption ? table.caption.textContent : "table").replace(/[^A-Za-z0-9]+/g, "-") + ".csv", rows.join("\n") + "\n", "text/csv");
    });
    table.parentElement.after(button);
  }

  for (const button of document.querySelectorAll("button.download")) {
    button.addEventListener("click", () => save(button.dataset.file, JSON.stringify(data), "application/json"));
  }

  // ---- what if ----------------------------------------------------------------------------------------------------

  // Columns of a strategy in a cell.
  const NAME = 0, STEP = 1, RATE = 2, FITS = 4, STEP_TEXT = 5, RATE_TEXT = 6, MEMORY_TEXT = 7, COMMUNICATION = 8, BUBBLE = 9;

  for (const panel of document.querySelectorAll(".what-if")) {
    const spec = data.charts.find((chart) => chart.kind === "what-if");
    const result = (name) => panel.querySelector(`[data-result="${name}"]`);
    const chosen = panel.querySelector('select[data-stop="strategy"]');
    const stop = (name) => spec[name][Number(panel.querySelector(`input[data-stop="${name}"]`).value)];
    const cellAt = (at) => spec.cells.find((cell) => cell.at.every((value, n) => value === at[n]));
    const best = (cell) => cell && cell.strategies.filter((each) => each[FITS]).sort((a, b) => a[STEP] - b[STEP])[0];
    const words = {devices: (value) => value.toLocaleString("en"), bandwidth: (value) => "× " + value, batch: (value) => value.toLocaleString("en")};

    // Offer the strategies of this number of devices, and keep the one that was chosen if it is among them.
    function offer(cell) {
      const names = cell ? [...cell.strategies.map((each) => each[NAME]), ...cell.rejected.map((each) => each[0])] : [];
      const kept = names.includes(chosen.value) ? chosen.value : "";
      chosen.replaceChildren(new Option("the best one", ""), ...names.map((name) => new Option(name, name)));
      chosen.value = kept;
    }

    // Samples/s of the best strategy on the fewest devices that fit, for one device of them.
    function perDevice(bandwidth, batch) {
      for (const devices of spec.devices) {
        const found = best(cellAt([devices, bandwidth, batch]));
        if (found) return found[RATE] / devices;
      }
      return null;
    }

    function show() {
      const at = ["devices", "bandwidth", "batch"].map(stop), cell = cellAt(at);
      ["devices", "bandwidth", "batch"].forEach((name, n) => {
        panel.querySelector(`[data-shows="${name}"]`).textContent = words[name](at[n]);
        panel.querySelector(`input[data-stop="${name}"]`).setAttribute("aria-valuetext", words[name](at[n]));
      });
      offer(cell);
      const found = cell && (chosen.value ? cell.strategies.find((each) => each[NAME] === chosen.value) : best(cell));
      const refused = cell && cell.rejected.find((each) => each[0] === chosen.value);
      const write = (name, text) => { result(name).textContent = text; };
      if (!found) {
        write("strategy", !cell ? "not computed" : refused ? refused[0] : "none fits");
        for (const name of ["step", "rate", "efficiency", "memory", "cost"]) write(name, "–");
        write("binds", !cell ? "This setting was left out, to write this page in time: run the command."
          : refused ? "Cannot be: " + refused[1] : "No strategy fits into the memory of these devices.");
      } else {
        const each = perDevice(at[1], at[2]), hourly = spec.dollars_per_hour[String(at[0])];
        write("strategy", found[NAME] + (found[FITS] ? "" : " (does not fit)"));
        write("step", found[STEP_TEXT]);
        result("step").dataset.exact = String(found[STEP]);
        write("rate", found[RATE_TEXT]);
        result("rate").dataset.exact = String(found[RATE]);
        write("memory", found[MEMORY_TEXT]);
        write("efficiency", each ? Math.round(100 * found[RATE] / at[0] / each) + "%" : "–");
        write("cost", hourly ? (hourly / 3600 / found[RATE] * 1e6).toFixed(2) : "not known");
        const waits = [["waiting for communication", found[COMMUNICATION]], ["waiting for other stages", found[BUBBLE]]]
          .filter((wait) => wait[1] >= .005).map((wait) => `${Math.round(100 * wait[1])}% of the step is ${wait[0]}`);
        write("binds", waits.length ? waits.join(", ") + "." : "Computing fills the step.");
      }
      const strategy = chosen.value || (found ? found[NAME] : cell ? "" : at[0] === 1 ? "single" : `dp=${at[0]}`);
      write("command", command(at, strategy));
    }

    function command(at, strategy) {
      if (!spec.command || !strategy) return "the workload has no name on the command line";
      const batch = at[2] === spec.here.batch ? "" : spec.batch_setting ? ` --set ${spec.batch_setting}=${at[2]}` : ` (with a batch of ${at[2]})`;
      const links = at[1] === 1 ? "" : ` --bandwidth ${at[1]}`;
      return `${spec.command} --cluster ${spec.clusters[String(at[0])]}${batch}${links} --strategy ${strategy} --json`;
    }

    panel.addEventListener("input", show);
    show();
  }
})();
