"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const read = (id) => JSON.parse($(id).textContent);
  const report = read("report");
  const AT_THRESHOLD = 127.5; // of a map's 255 levels: the scale is full at twice the threshold
  const PER_PAGE = 120; // test images shown before "Show more"
  const [WORDS, SIGNS] = [0, 1].map((part) => Object.fromEntries(Object.entries(report.decisions).map(([name, parts]) => [name, parts[part]])));
  const TERMS = new RegExp(Object.entries(report.terms).map(([key, words]) => `(?<${key}>\\b(?:${words})\\b)`).join("|"), "gi");
  const PANELS = { input: "input", map: "anomaly map", overlay: "overlay", mask: "predicted mask", truth: "ground truth" };

  // ---- elements: names are other people's, so everything goes in as text ----

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (value !== null && value !== false) made.setAttribute(key, value === true ? "" : value);
    }
    made.append(...children.filter((child) => child !== null));
    return made;
  }

  function drawn(name, attributes = {}, ...children) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  /** A sentence, in which each term can be opened where it first stands. */
  function explained(text) {
    const parts = [], seen = new Set();
    let from = 0;
    for (const found of text.matchAll(TERMS)) {
      const [key] = Object.entries(found.groups).find(([, words]) => words !== undefined);
      if (seen.has(key)) continue;
      seen.add(key);
      parts.push(text.slice(from, found.index), termButton(key, "term", found[0]));
      from = found.index + found[0].length;
    }
    return [...parts, text.slice(from)];
  }

  const termButton = (key, kind, text = "") => element("button", { type: "button", class: kind, popovertarget: `term-${key}`,
    "aria-label": text ? null : `What is ${$(`term-${key}`).firstChild.textContent}?` }, text);

  const short = (value) => (Number.isFinite(value) ? String(Number(value.toPrecision(4))) : "-");
  const percent = (share) => `${(100 * share).toFixed(1)}\u00a0%`;
  const money = (value) => {
    const digits = Math.abs(value) < 10 ? 2 : 0;
    return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  };
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  /** The 95 % interval of a share, Clopper and Pearson's, as the report's tables have it. */
  const interval = (count, total) => (total ? state.block.intervals[total][count] : [0, 1]);

  // ---- the leaderboard: one metric at a time, sorted by any column ----

  function startLeaderboard() {
    for (const table of document.querySelectorAll("table.sortable")) makeSortable(table);
    const choice = $("metric");
    if (!choice) return; // nothing was tested, so that there is no figure
    const boards = [...document.querySelectorAll(".board")];
    const show = () => boards.forEach((board) => { board.hidden = board.dataset.metric !== choice.value; });
    choice.addEventListener("change", show);
    $("metric-controls").hidden = false;
    show();
  }

  function makeSortable(table) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = element("button", { type: "button" });
      button.append(head.firstChild);
      button.firstChild.textContent = button.firstChild.textContent.trim();
      head.prepend(button);
      button.addEventListener("click", () => {
        // The first click puts the best on top: the highest, except where less is better, and names from A.
        const bestFirst = head.dataset.sort === "number" && head.dataset.best !== "low" ? "descending" : "ascending";
        const other = bestFirst === "descending" ? "ascending" : "descending";
        const direction = head.getAttribute("aria-sort") === bestFirst ? other : bestFirst;
        heads.forEach((each) => each.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", direction);
        sortRows(table.tBodies[0], column, head.dataset.sort, direction === "ascending" ? 1 : -1);
      });
    });
  }

  function sortRows(body, column, kind, sign) {
    const value = (row) => row.cells[column].dataset.value;
    const compare = (a, b) => {
      if (kind === "text") return sign * value(a).localeCompare(value(b));
      if (value(a) === "" || value(b) === "") return (value(a) === "") - (value(b) === ""); // what is not there, last
      return sign * (Number(value(a)) - Number(value(b)));
    };
    body.append(...[...body.rows].sort(compare));
  }

  // ---- pages ----

  const state = { category: null, model: null, chosen: null, cell: null, threshold: 0, low: 0, high: 1, shown: PER_PAGE, order: [], panel: "overlay", stage: 0, zoom: 1 };
  const blocks = new Map();

  function block(name) {
    if (!blocks.has(name)) blocks.set(name, read(`category-${report.categories.indexOf(name)}`));
    return blocks.get(name);
  }

  const address = (category, model) => `#/${encodeURIComponent(category)}/${encodeURIComponent(model)}`;

  function route(moved) {
    if (location.hash && !location.hash.startsWith("#/")) return; // a place on the page, not a page
    const names = location.hash.slice(2).split("/").map(decoded);
    const isCategory = report.categories.includes(names[0]);
    $("overview").hidden = isCategory;
    $("category").hidden = !isCategory;
    const links = [...$("pages").querySelectorAll("a")];
    links.forEach((link, place) => {
      const current = isCategory ? report.categories[place - 1] === names[0] : place === 0;
      if (current) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
      if (current) link.scrollIntoView({ block: "nearest", inline: "nearest" });
    });
    document.title = `Blemish: ${isCategory ? names[0] : report.dataSet}`;
    if (isCategory) openCategory(names[0], report.models.includes(names[1]) ? names[1] : null);
    if (moved) {
      window.scrollTo({ top: 0, behavior: "instant" });
      if ($("viewer").open) $("viewer").close();
      $(isCategory ? "category-title" : "overview-title").focus({ preventScroll: true });
    }
    const place = Number(names[2] || NaN);
    if (isCategory && state.order.includes(place)) openViewer(place);
  }

  function decoded(text) {
    try { return decodeURIComponent(text); } catch { return ""; }
  }

  /** Without a model, of the one that was chosen, or of the best. */
  function openCategory(name, chosen) {
    const fresh = state.category !== name;
    state.category = name;
    state.block = block(name);
    state.chosen = chosen || state.chosen;
    const model = state.block.models.includes(state.chosen) ? state.chosen : state.block.models[0];
    state.model = model;
    state.cell = state.block.cells[model];
    state.shown = PER_PAGE;
    const { scores, threshold } = state.cell;
    const known = [...scores.filter((score) => score !== null), threshold];
    const low = Math.min(...known), high = Math.max(...known), margin = (high - low) * 0.02 || 1;
    Object.assign(state, { low: low - margin, high: high + margin, candidates: candidates(scores) });
    $("category-title").textContent = name;
    $("note").replaceChildren(...explained(state.cell.note));
    $("lowest").textContent = short(state.low);
    $("highest").textContent = short(state.high);
    $("run").hidden = !state.cell.runUrl;
    if (state.cell.runUrl) $("run").href = state.cell.runUrl;
    $("run-needs").hidden = !state.cell.runNeedsServer;
    fillModels();
    fillGroups();
    const isTested = scores.some((score) => score !== null);
    $("tested").hidden = !isTested;
    $("untested").hidden = isTested;
    if (!isTested) return;
    if (fresh) fillTypes();
    setThreshold(threshold);
    drawCurves();
    fillGallery();
  }

  function fillModels() {
    const legend = $("models").querySelector("legend");
    $("models").hidden = report.models.length < 2;
    $("models").replaceChildren(legend, ...state.block.models.map((model) => {
      const input = element("input", { type: "radio", name: "model", value: model });
      input.checked = model === state.model;
      input.addEventListener("change", () => {
        history.replaceState(null, "", address(state.category, model));
        openCategory(state.category, model);
        $("models").querySelector(":checked").focus();
      });
      return element("label", {}, input, model);
    }));
  }

  function fillGroups() {
    const { groups } = state.cell;
    $("groups").hidden = !groups;
    if (!groups) return;
    $("groups-note").textContent = `${groups.text[0].toUpperCase()}${groups.text.slice(1)}.`;
    $("group-rows").replaceChildren(...groups.rows.map(([name, ...figures]) => element("tr", {},
      element("th", { scope: "row", class: "name" }, name),
      ...figures.map((figure) => element("td", { class: "number" }, figure)))));
  }

  function fillTypes() {
    const types = [...new Set(state.block.images.map(([, defect]) => defect))];
    $("defect").replaceChildren(element("option", { value: "" }, "all"), ...types.map((type) => element("option", { value: type }, type)));
  }

  // ---- the threshold ----

  const decision = (score, threshold, label) => (label ? (score > threshold ? "hit" : "miss") : score > threshold ? "alarm" : "pass");
  const verdict = (place, threshold = state.threshold) => decision(state.cell.scores[place], threshold, state.block.images[place][2]);

  function counts(threshold = state.threshold) {
    const found = { hit: 0, miss: 0, alarm: 0, pass: 0 };
    state.cell.scores.forEach((score, place) => { if (score !== null) found[verdict(place, threshold)] += 1; });
    return { ...found, defects: found.hit + found.miss, good: found.alarm + found.pass };
  }

  const toSlider = (score) => Math.round((1000 * (score - state.low)) / (state.high - state.low));
  const fromSlider = (value) => state.low + (value / 1000) * (state.high - state.low);

  function setThreshold(threshold) {
    state.threshold = threshold;
    $("threshold").value = toSlider(clamp(threshold, state.low, state.high));
    $("threshold").setAttribute("aria-valuetext", short(threshold));
    if (document.activeElement !== $("threshold-value")) $("threshold-value").value = short(threshold);
    showThreshold();
  }

  function showThreshold() {
    const found = counts();
    for (const name of Object.keys(WORDS)) $(`count-${name}`).textContent = found[name];
    const parts = [];
    if (found.defects) parts.push(`${found.hit} of ${found.defects} defects found (${percent(found.hit / found.defects)})`);
    if (found.good) parts.push(`${found.alarm} of ${found.good} good parts rejected (${percent(found.alarm / found.good)})`);
    $("decided").textContent = `${parts.join(", ")}.`;
    const moved = state.threshold !== state.cell.threshold;
    $("reset").disabled = !moved;
    $("oracle-note").textContent = moved
      ? "Moved: a threshold chosen by looking at the test images promises nothing for other parts."
      : "This is the deployed threshold; it has not seen the test images.";
    const { defects, good } = found;
    show("deploy-slider", deploying(state.threshold, moved ? `chosen on ${good + defects} test images` : "as exported"));
    drawHistogram();
    drawCosts();
    drawTypes();
    state.marks?.();
    markGallery();
  }

  // ---- the command that deploys a threshold ----

  const quoted = (name) => (/^[\w.-]+$/.test(name) ? name : `"${name}"`); // a name has no sign that ends a quotation

  /** The threshold with the fewest digits that decide on every test image as it does; the deployed one in full. */
  function written(threshold) {
    const scores = state.cell.scores.filter((score) => score !== null);
    for (let digits = 4; digits < 17 && threshold !== state.cell.threshold; digits += 1) {
      const rounded = Number(threshold.toPrecision(digits));
      if (scores.every((score) => (score > rounded) === (score > threshold))) return String(rounded);
    }
    return String(threshold);
  }

  function deploying(threshold, because) {
    return `blemish threshold ${quoted(state.model)} ${quoted(state.category)} ${written(threshold)} --because "${because}"`;
  }

  /** A command, of whose options no line ends after the first hyphen. */
  function show(id, command) {
    $(id).replaceChildren(...command.split(/(--[a-z]+)/).map((part) => (part.startsWith("--") ? element("span", { class: "option" }, part) : part)));
  }

  async function copy(button) {
    const code = $(button.dataset.copies);
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    } catch { // a browser that does not let a page write: it is marked, to be copied by hand
      getSelection().selectAllChildren(code);
    }
  }

  /** A chart as wide as its place; gives [svg, width]. */
  function chart(host, height, label) {
    const width = Math.max(host.clientWidth, 120);
    const made = drawn("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
    host.replaceChildren(made);
    return [made, width];
  }

  // A slider's thumb does not reach the ends of its track; the charts above and below it start where the thumb does.
  const THUMB = 8;
  const along = (score, width) => THUMB + ((score - state.low) / (state.high - state.low)) * (width - 2 * THUMB);

  /** Good parts above the line, defects below: place tells them apart, not colour alone. */
  function drawHistogram() {
    const [svg, width] = chart($("histogram"), 170, "Scores of the test images: good parts upwards, defects downwards");
    const bins = 40, middle = 85, room = 66, heights = [new Array(bins).fill(0), new Array(bins).fill(0)];
    state.cell.scores.forEach((score, place) => {
      if (score === null) return;
      const bin = Math.min(bins - 1, Math.floor((bins * (score - state.low)) / (state.high - state.low)));
      heights[Number(state.block.images[place][2])][bin] += 1;
    });
    const most = Math.max(1, ...heights[0], ...heights[1]), step = (width - 2 * THUMB) / bins;
    const cut = along(clamp(state.threshold, state.low, state.high), width);
    svg.append(drawn("rect", { class: "area", x: cut, y: 0, width: width - cut, height: 170 }));
    heights.forEach((of, label) => of.forEach((count, bin) => {
      const height = (room * count) / most;
      const y = label ? middle + 1 : middle - 1 - height;
      if (count) svg.append(drawn("rect", { class: label ? "defect" : "good", x: THUMB + bin * step + 0.5, y, width: Math.max(1, step - 1), height }));
    }));
    const deployed = along(state.cell.threshold, width);
    svg.append(
      drawn("line", { class: "axis", x1: 0, x2: width, y1: middle, y2: middle }),
      drawn("line", { class: "deployed", x1: deployed, x2: deployed, y1: 0, y2: 170 }),
      drawn("line", { class: "now", x1: cut, x2: cut, y1: 0, y2: 170 }),
      words(4, 12, "good"), words(4, 166, "defective"), words(width - 4, 12, "flagged", "end"),
    );
  }

  function words(x, y, text, anchor = "start", kind = "") {
    return drawn("text", { x, y, "text-anchor": anchor, class: kind }, text);
  }

  function drawTypes() {
    const groups = new Map();
    state.block.images.forEach(([, defect, label], place) => {
      if (state.cell.scores[place] === null) return;
      const group = groups.get(defect) || { label, total: 0, flagged: 0 };
      group.total += 1;
      group.flagged += Number(state.cell.scores[place] > state.threshold);
      groups.set(defect, group);
    });
    const sorted = [...groups].sort((a, b) => Number(a[1].label) - Number(b[1].label) || a[0].localeCompare(b[0]));
    $("types").replaceChildren(...sorted.map(([name, { label, total, flagged }]) => {
      const [low, high] = interval(flagged, total), width = 160, share = flagged / total;
      const bar = drawn("svg", { viewBox: `0 0 ${width} 14`, preserveAspectRatio: "none", "aria-hidden": "true" },
        drawn("rect", { class: "area", x: 0, y: 2, width, height: 10 }),
        drawn("rect", { class: label ? "good" : "defect", x: 0, y: 2, width: share * width, height: 10 }),
        drawn("line", { class: "now", x1: low * width, x2: high * width, y1: 7, y2: 7 }));
      return element("tr", {},
        element("th", { scope: "row", class: "name" }, name),
        element("td", { class: "number" }, `${flagged} of ${total}`),
        element("td", {}, element("div", { class: "share" }, bar, element("span", {}, percent(share),
          element("span", { class: "sub" }, `${(100 * low).toFixed(1)} to ${(100 * high).toFixed(1)}`)))));
    }));
  }

  // ---- costs ----

  /** Thresholds that decide differently: one between each two neighbouring scores, and one beyond either end. */
  function candidates(scores) {
    const sorted = [...new Set(scores.filter((score) => score !== null))].sort((a, b) => a - b);
    if (!sorted.length) return [0];
    const inner = sorted.slice(1).map((score, place) => (score + sorted[place]) / 2);
    const margin = (sorted.at(-1) - sorted[0]) * 0.01 || 1;
    return [sorted[0] - margin, ...inner, sorted.at(-1) + margin];
  }

  const amount = (id) => Math.max(0, Number($(id).value) || 0);
  const defectiveShare = () => clamp(amount("prevalence"), 0, 100) / 100;

  function costOf(alarmShare, missShare, goodLooks = 0, defectLooks = 0) {
    const defective = defectiveShare(), look = amount("review-cost");
    return 10000 * ((1 - defective) * (alarmShare * amount("reject-cost") + goodLooks * look)
      + defective * (missShare * amount("escape-cost") + defectLooks * look));
  }

  /** The deployed model where a person looks at what lies between its two thresholds, and decides rightly. */
  function withReview() {
    const { threshold, review } = state.cell, above = review.above ?? Infinity;
    const found = [[0, 0, 0], [0, 0, 0]]; // good ones and defects: accepted, looked at, rejected
    state.cell.scores.forEach((score, place) => {
      if (score === null) return;
      found[Number(state.block.images[place][2])][score <= threshold ? 0 : score <= above ? 1 : 2] += 1;
    });
    const [good, defects] = found.map((answers) => answers.reduce((sum, one) => sum + one));
    const share = (hits, total) => (total ? hits / total : 0);
    const places = [[found[0][2], good], [found[1][0], defects], [found[0][1], good], [found[1][1], defects]];
    const ends = places.map(([hits, total]) => interval(hits, total));
    return {
      threshold,
      cost: costOf(...places.map(([hits, total]) => share(hits, total))),
      low: costOf(...ends.map(([low]) => low)),
      high: costOf(...ends.map(([, high]) => high)),
      looks: 10000 * ((1 - defectiveShare()) * share(found[0][1], good) + defectiveShare() * share(found[1][1], defects)),
    };
  }

  function expectedCost(threshold) {
    const { miss, defects, alarm, good } = counts(threshold);
    const [alarmLow, alarmHigh] = interval(alarm, good), [missLow, missHigh] = interval(miss, defects);
    return {
      threshold,
      cost: costOf(good ? alarm / good : 0, defects ? miss / defects : 0),
      low: costOf(alarmLow, missLow),
      high: costOf(alarmHigh, missHigh),
    };
  }

  /** Among equally cheap ones, the nearest to the deployed threshold. */
  function cheapest(all) {
    const away = (point) => Math.abs(point.threshold - state.cell.threshold);
    return all.reduce((best, point) => (point.cost < best.cost || (point.cost === best.cost && away(point) < away(best)) ? point : best));
  }

  function drawCosts() {
    const all = [...state.candidates, state.cell.threshold].sort((a, b) => a - b).map(expectedCost);
    const best = cheapest(all);
    state.cheapest = best.threshold;
    const rows = [["deployed", expectedCost(state.cell.threshold)], ["slider", expectedCost(state.threshold)], ["cheapest", best]];
    if (state.cell.review) rows.splice(1, 0, ["with review", withReview()]);
    $("review-note").textContent = state.cell.review
      ? `With review, a person looks at ${Math.round(withReview().looks)} of 10,000 parts and decides rightly; the rest is as deployed.` : "";
    $("costs").replaceChildren(...rows.map(([name, point]) => element("tr", { "data-name": name },
      element("th", { scope: "row" }, name),
      element("td", { class: "number" }, short(point.threshold)),
      element("td", { class: "number" }, element("b", {}, money(point.cost)),
        element("span", { class: "sub" }, `${money(point.low)} to ${money(point.high)}`)))));
    drawCostCurve(all, best);
    const [reject, escape, prevalence] = ["reject-cost", "escape-cost", "prevalence"].map((id) => $(id).value || "0");
    const { defects, good } = counts();
    show("deploy-cheapest", deploying(best.threshold, `cheapest on ${good + defects} test images, where rejecting a `
      + `good part costs ${reject}, a defect that escapes ${escape}, and ${prevalence} percent are defective`));
  }

  function drawCostCurve(all, best) {
    const [svg, width] = chart($("cost-chart"), 120, "Expected cost per 10,000 parts by threshold");
    const most = Math.max(...all.map((point) => point.cost)) || 1, floor = 104;
    const y = (cost) => floor - (cost / most) * 86;
    // Between two candidates the cost does not change: steps, not slopes.
    const steps = all.map((point, place) => {
      const next = all[place + 1] ? along(clamp(all[place + 1].threshold, state.low, state.high), width) : width - THUMB;
      const here = along(clamp(point.threshold, state.low, state.high), width);
      return `${place ? "L" : "M"}${here.toFixed(1)} ${y(point.cost).toFixed(1)}H${next.toFixed(1)}`;
    });
    const now = along(clamp(state.threshold, state.low, state.high), width);
    const deployed = along(state.cell.threshold, width);
    svg.append(
      drawn("line", { class: "axis", x1: 0, x2: width, y1: floor, y2: floor }),
      drawn("line", { class: "deployed", x1: deployed, x2: deployed, y1: 14, y2: floor }),
      drawn("line", { class: "now", x1: now, x2: now, y1: 14, y2: floor }),
      drawn("path", { class: "line", d: steps.join("") }),
      drawn("circle", { class: "dot", r: 5.5, cx: along(clamp(best.threshold, state.low, state.high), width), cy: y(best.cost) }),
      words(4, 10, money(most)), words(4, 118, short(state.low)), words(width - 4, 118, short(state.high), "end"),
    );
  }

  // ---- curves ----

  /** ROC and precision-recall of the images: [x, y, threshold] from the strictest threshold on. */
  function imageCurves() {
    const ranked = state.cell.scores.map((score, place) => [score, state.block.images[place][2]]).filter(([score]) => score !== null);
    ranked.sort((a, b) => b[0] - a[0]);
    const defects = ranked.filter(([, label]) => label).length, good = ranked.length - defects;
    const points = [{ rate: 0, recall: 0, precision: null }];
    let hits = 0, alarms = 0;
    ranked.forEach(([score, label], place) => {
      if (label) hits += 1; else alarms += 1;
      if (place + 1 < ranked.length && ranked[place + 1][0] === score) return; // equal scores make one point
      points.push({ rate: alarms / (good || 1), recall: hits / (defects || 1), precision: hits / (hits + alarms) });
    });
    return points;
  }

  function drawCurves() {
    const points = imageCurves(), kept = state.cell.curves, figures = [];
    const both = points.length > 1 && points.at(-1).rate === 1 && points.at(-1).recall === 1;
    const now = () => {
      const { hit, alarm, defects, good } = counts();
      return { rate: alarm / (good || 1), recall: hit / (defects || 1), precision: hit + alarm ? hit / (hit + alarm) : null };
    };
    if (both) {
      figures.push(["ROC, images", "auroc", "false alarms", "found", points.map((p) => [p.rate, p.recall]), 1, () => [now().rate, now().recall]]);
      figures.push(["Precision-recall, images", "ap", "found", "precision", points.slice(1).map((p) => [p.recall, p.precision]), 1,
        () => (now().precision === null ? null : [now().recall, now().precision])]);
    }
    const zip = ([x, y]) => x.map((value, place) => [value, y[place]]);
    if (kept.roc) figures.push(["ROC, pixels", "auroc", "false-positive rate", "recall", zip(kept.roc), 1, null]);
    if (kept.precision_recall) figures.push(["Precision-recall, pixels", "ap", "recall", "precision", zip(kept.precision_recall), 1, null]);
    if (kept.pro) figures.push(["PRO, regions", "aupro", "false-positive rate of pixels", "overlap", zip(kept.pro), 0.3, null]);
    const hosts = figures.map(([title, term]) => element("figure", {}, element("figcaption", {}, title, termButton(term, "hint")), element("div")));
    $("curves").replaceChildren(...hosts);
    $("curves").closest("section").hidden = !figures.length;
    const marks = figures.map((figure, place) => drawCurve(hosts[place].lastChild, figure));
    state.marks = () => marks.forEach((mark) => mark());
  }

  /** Gives a function that moves the mark to where the threshold is now. */
  function drawCurve(host, [title, , xName, yName, points, most, mark]) {
    const [svg, width] = chart(host, 200, `${title}: ${yName} over ${xName}`);
    const left = 28, top = 8, right = width - 10, floor = 166;
    const x = (value) => left + (value / most) * (right - left), y = (value) => floor - value * (floor - top);
    svg.append(
      drawn("line", { class: "axis", x1: left, x2: right, y1: floor, y2: floor }),
      drawn("line", { class: "axis", x1: left, x2: left, y1: top, y2: floor }),
      words(left - 4, floor + 3, "0", "end"), words(left - 4, top + 8, "1", "end"), words(left, floor + 14, "0"),
      words(right, floor + 14, String(most), "end"), words((left + right) / 2, floor + 30, xName, "middle"),
      drawn("text", { transform: `translate(12 ${(top + floor) / 2}) rotate(-90)`, "text-anchor": "middle" }, yName),
    );
    if (title.startsWith("ROC")) svg.append(drawn("line", { class: "chance", x1: x(0), y1: y(0), x2: x(1), y2: y(1) }));
    const path = points.map(([a, b], place) => `${place ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`);
    svg.append(drawn("path", { class: "line", d: path.join("") }));
    if (!mark) return () => {};
    const dot = drawn("circle", { class: "dot", r: 5.5 });
    svg.append(dot);
    const move = () => {
      const at = mark();
      dot.setAttribute("visibility", at ? "visible" : "hidden");
      if (at) { dot.setAttribute("cx", x(at[0])); dot.setAttribute("cy", y(at[1])); }
    };
    move();
    return move;
  }

  // ---- pictures: the input and the true mask are shared, and each model has a small grey map ----

  const images = new Map(); // data URI -> promise of a decoded image, for the page that is open

  function decodedImage(uri) {
    if (!images.has(uri)) {
      const image = new Image();
      image.src = uri;
      images.set(uri, image.decode().then(() => image));
    }
    return images.get(uri);
  }

  const scratch = element("canvas").getContext("2d", { willReadFrequently: true });

  /** The map's levels, resized to the picture. */
  function levelsOf(map, width, height) {
    Object.assign(scratch.canvas, { width, height });
    scratch.imageSmoothingQuality = "high";
    scratch.drawImage(map, 0, 0, width, height);
    const { data } = scratch.getImageData(0, 0, width, height);
    const levels = new Uint8Array(width * height);
    for (let place = 0; place < levels.length; place += 1) levels[place] = data[4 * place];
    return levels;
  }

  /** A pixel as one number, in this machine's order of bytes. */
  const word = (...bytes) => new Uint32Array(Uint8ClampedArray.from(bytes).buffer)[0];
  const CONTOUR = word(0, 255, 255, 255);
  const levelWords = (wordOf) => Uint32Array.from({ length: 256 }, (_, level) => wordOf(report.scale.colours[level], level));
  const LAYERS = {
    map: levelWords((colour) => word(...colour, 255)),
    overlay: levelWords((colour, level) => word(...colour, Math.round(255 * report.scale.opacity[level]))),
    mask: levelWords((_, level) => (level > AT_THRESHOLD ? word(255, 255, 255, 255) : word(0, 0, 0, 255))),
  };

  /** (levels, panel) -> pixels to lay over the input; opaque for the map and the mask. */
  function layer(levels, width, height, panel) {
    const pixels = new ImageData(width, height), words = new Uint32Array(pixels.data.buffer), colours = LAYERS[panel];
    const thickness = Math.max(1, Math.round(Math.max(width, height) / 400)); // a large picture is shown smaller than it is
    for (let place = 0; place < levels.length; place += 1) {
      const isContour = panel === "overlay" && onContour(levels, width, height, place, thickness);
      words[place] = isContour ? CONTOUR : colours[levels[place]];
    }
    return pixels;
  }

  function onContour(levels, width, height, place, thickness) {
    if (levels[place] <= AT_THRESHOLD) return false;
    const x = place % width, y = (place - x) / width, rows = thickness * width;
    const outside = (inside, neighbour) => inside && levels[neighbour] <= AT_THRESHOLD;
    return outside(x >= thickness, place - thickness) || outside(x < width - thickness, place + thickness)
      || outside(y >= thickness, place - rows) || outside(y < height - thickness, place + rows);
  }

  /** What fills a panel's place: a canvas that will be painted, or a word where the category has no masks. */
  function panelOf(place, model, panel) {
    const { pictures, hasMasks } = state.block;
    if (panel === "truth" && !hasMasks) return element("span", { class: "blank" }, "no mask");
    const [width, height] = pictures.sizes[place];
    return element("canvas", { width, height, role: "img", "aria-label": `${PANELS[panel]} of ${state.block.images[place][0]}` });
  }

  /** `large`: an image to show in place of the small input, if there is one. */
  async function paint(canvas, place, model, panel, large = null) {
    if (!(canvas instanceof HTMLCanvasElement)) return;
    const { pictures } = state.block, { width, height } = canvas, context = canvas.getContext("2d");
    if (panel === "truth") {
      const truth = pictures.truths[place] && (await decodedImage(pictures.truths[place]));
      context.fillRect(0, 0, width, height);
      context.imageSmoothingEnabled = false;
      if (truth) context.drawImage(truth, 0, 0, width, height);
      return;
    }
    const needsInput = panel === "input" || panel === "overlay";
    const [base, map] = await Promise.all([
      needsInput && (large || decodedImage(pictures.inputs[place])),
      panel !== "input" && decodedImage(pictures.maps[model][place]),
    ]);
    if (base) context.drawImage(base, 0, 0, width, height);
    if (!map) return;
    const over = layer(levelsOf(map, width, height), width, height, panel);
    Object.assign(scratch.canvas, { width, height });
    scratch.putImageData(over, 0, 0);
    context.drawImage(scratch.canvas, 0, 0);
  }

  // ---- the gallery ----

  const painter = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((each) => each.isIntersecting)) {
      painter.unobserve(entry.target);
      paint(entry.target, Number(entry.target.dataset.place), state.model, $("view").value);
    }
  }, { rootMargin: "300px" });

  /** Highest scores first, so that the threshold cuts the list in two. */
  function fillGallery() {
    images.clear();
    const places = state.cell.scores.map((score, place) => place).filter((place) => state.cell.scores[place] !== null);
    state.order = places.sort((a, b) => state.cell.scores[b] - state.cell.scores[a]);
    state.tiles = new Map();
    $("gallery").replaceChildren();
    markGallery();
  }

  function tileOf(place) {
    if (!state.tiles.has(place)) {
      const panel = panelOf(place, state.model, $("view").value);
      panel.dataset.place = place;
      painter.observe(panel);
      const sign = element("b"), type = state.block.images[place][1];
      const button = element("button", { type: "button", class: "tile" }, panel,
        element("span", { class: "words" }, sign, element("br"), type, element("br"),
          element("span", { class: "quiet" }, `score ${short(state.cell.scores[place])}`)));
      button.addEventListener("click", () => openViewer(place));
      state.tiles.set(place, { item: element("li", {}, button), button, sign });
    }
    return state.tiles.get(place);
  }

  const wanted = {
    all: () => true,
    flagged: (name) => name === "hit" || name === "alarm",
    passed: (name) => name === "miss" || name === "pass",
    wrong: (name) => name === "miss" || name === "alarm",
    miss: (name) => name === "miss",
    alarm: (name) => name === "alarm",
  };

  function markGallery() {
    if (!state.tiles) return;
    const type = $("defect").value, isWanted = wanted[$("filter").value];
    state.visible = state.order.filter((place) => isWanted(verdict(place)) && (!type || state.block.images[place][1] === type));
    const shown = state.visible.slice(0, state.shown);
    const items = shown.map((place) => {
      const { item, button, sign } = tileOf(place), name = verdict(place);
      button.classList.toggle("flagged", wanted.flagged(name));
      button.dataset.verdict = name;
      if (sign.dataset.verdict !== name) {
        sign.dataset.verdict = name;
        sign.className = `verdict-${name}`;
        sign.textContent = `${SIGNS[name]} ${WORDS[name]}`;
      }
      return item;
    });
    const present = $("gallery").children;
    // Moving the slider mostly changes marks, not the list; leave the list alone then.
    if (items.length !== present.length || items.some((item, place) => item !== present[place])) $("gallery").replaceChildren(...items);
    $("shown").textContent = `${state.visible.length} of ${state.order.length}`;
    $("more").hidden = state.visible.length <= state.shown;
  }

  function drawScale() {
    const context = $("scale").getContext("2d"), pixels = new ImageData(256, 1);
    report.scale.colours.forEach((colour, level) => pixels.data.set([...colour, 255], 4 * level));
    context.putImageData(pixels, 0, 0);
  }

  // ---- one image, large, and what the other models say of it ----

  function openViewer(place) {
    const [path, defect] = state.block.images[place], name = verdict(place);
    state.viewed = place;
    $("viewer-title").textContent = `${defect}: ${path}`;
    $("viewer-verdict").textContent = `${state.model}: ${WORDS[name]}, score ${short(state.cell.scores[place])}, threshold ${short(state.threshold)}`;
    $("viewer-verdict").className = `verdict verdict-${name}`;
    $("viewer-panels").replaceChildren(...Object.keys(PANELS).map((panel) => choiceOf(place, panel, panel === "input" ? `input: ${defect}` : PANELS[panel])));
    const others = state.block.models.filter((model) => model !== state.model && state.block.cells[model].scores[place] !== null);
    $("viewer-others").replaceChildren(...(others.length ? [element("h4", {}, "Other models, at their deployed thresholds"), element("div", { class: "panels" },
      ...others.map((model) => {
        const { scores, threshold } = state.block.cells[model], own = decision(scores[place], threshold, state.block.images[place][2]);
        return figureOf(place, model, "overlay", `${model}: ${WORDS[own]}, score ${short(scores[place])}, threshold ${short(threshold)}`, own);
      }))] : []));
    const at = state.visible.indexOf(place);
    $("previous").disabled = at <= 0;
    $("next").disabled = at < 0 || at === state.visible.length - 1;
    if (!$("viewer").open) $("viewer").showModal();
    state.zoom = 1;
    fillStage(); // laid out by now
  }

  function figureOf(place, model, panel, caption, name) {
    const made = panelOf(place, model, panel);
    paint(made, place, model, panel);
    return element("figure", {}, stamped(made, panel, name), element("figcaption", {}, caption));
  }

  /** An overlay says in words what was decided, wherever it is shown. */
  function stamped(made, panel, name) {
    const words = panel === "overlay" ? element("span", { class: `stamp verdict-${name}` }, `${SIGNS[name]} ${WORDS[name]}`) : null;
    return element("span", { class: "picture" }, made, words);
  }

  /** A small panel, which puts itself on the stage. */
  function choiceOf(place, panel, caption) {
    const figure = figureOf(place, state.model, panel, caption, verdict(place));
    const button = element("button", { type: "button", "data-panel": panel }, figure);
    button.addEventListener("click", () => { state.panel = panel; fillStage(); });
    return button;
  }

  // ---- the stage: one panel, as large as there are pixels; the large picture lies beside the report, if it does ----

  async function fillStage() {
    const place = state.viewed, { large, sizes } = state.block;
    for (const button of $("viewer-panels").children) button.setAttribute("aria-pressed", button.dataset.panel === state.panel);
    const asked = (state.stage += 1);
    showOnStage(place, null);
    const [width, height] = sizes[place], original = `${width} × ${height} pixels`;
    $("original").hidden = !large.originals[place];
    if (large.originals[place]) $("original").href = large.originals[place];
    if (!large.pictures[place]) {
      const [small] = state.block.pictures.sizes[place];
      $("stage-note").textContent = small < width ? `Kept small; the original had ${original}.` : `${original}.`;
      return;
    }
    $("stage-note").textContent = "Loading the large picture.";
    const image = await decodedImage(large.pictures[place]).catch(() => null);
    if (asked !== state.stage) return; // something else is on the stage by now
    if (image) showOnStage(place, image);
    const shown = image && image.naturalWidth < width ? `${image.naturalWidth} × ${image.naturalHeight} of ` : "";
    $("stage-note").textContent = image ? `${shown}${original}.`
      : `Shown small: the large picture lies beside the report, in the folder pictures, which is not here. The original has ${original}.`;
  }

  function showOnStage(place, large) {
    const made = panelOf(place, state.model, state.panel);
    if (large && made instanceof HTMLCanvasElement) Object.assign(made, { width: large.naturalWidth, height: large.naturalHeight });
    $("stage").replaceChildren(stamped(made, state.panel, verdict(place)));
    paint(made, place, state.model, state.panel, large);
    zoom(1);
  }

  /** How large the picture is shown, 1 being as large as the stage lets all of it be; its middle stays in the middle. */
  function zoom(factor) {
    const stage = $("stage"), picture = stage.querySelector("canvas");
    if (!picture) return;
    state.zoom = clamp(state.zoom * factor, 1, 16);
    const middle = { x: (stage.scrollLeft + stage.clientWidth / 2) / stage.scrollWidth, y: (stage.scrollTop + stage.clientHeight / 2) / stage.scrollHeight };
    const whole = Math.min(stage.clientWidth / picture.width, stage.clientHeight / picture.height);
    picture.style.width = `${Math.floor(picture.width * whole * state.zoom)}px`;
    stage.scrollTo({ left: middle.x * stage.scrollWidth - stage.clientWidth / 2, top: middle.y * stage.scrollHeight - stage.clientHeight / 2, behavior: "instant" });
    $("smaller").disabled = $("whole").disabled = state.zoom === 1;
    $("larger").disabled = state.zoom === 16;
  }

  function step(by) {
    const next = state.visible[state.visible.indexOf(state.viewed) + by];
    if (next !== undefined) openViewer(next);
  }

  function startViewer() {
    $("close").addEventListener("click", () => $("viewer").close());
    $("previous").addEventListener("click", () => step(-1));
    $("next").addEventListener("click", () => step(1));
    $("viewer").addEventListener("keydown", (event) => {
      const isScrolled = event.target === $("stage") && state.zoom > 1; // the arrows move the picture
      if (event.key === "ArrowLeft" && !isScrolled) step(-1);
      if (event.key === "ArrowRight" && !isScrolled) step(1);
      if (event.key === "+") zoom(1.5);
      if (event.key === "-") zoom(1 / 1.5);
    });
    $("larger").addEventListener("click", () => zoom(1.5));
    $("smaller").addEventListener("click", () => zoom(1 / 1.5));
    $("whole").addEventListener("click", () => zoom(0));
    $("viewer").addEventListener("click", (event) => { if (event.target === $("viewer")) $("viewer").close(); });
    $("viewer").addEventListener("close", () => state.tiles.get(state.viewed)?.button.focus());
  }

  function startCategory() {
    $("threshold").addEventListener("input", () => setThreshold(fromSlider(Number($("threshold").value))));
    $("threshold-value").addEventListener("input", () => {
      const value = $("threshold-value").valueAsNumber;
      if (Number.isFinite(value)) setThreshold(value);
    });
    $("reset").addEventListener("click", () => setThreshold(state.cell.threshold));
    $("use-cheapest").addEventListener("click", () => setThreshold(state.cheapest));
    for (const button of document.querySelectorAll("[data-copies]")) button.addEventListener("click", () => copy(button));
    for (const id of ["reject-cost", "escape-cost", "review-cost", "prevalence"]) $(id).addEventListener("input", drawCosts);
    for (const id of ["filter", "defect"]) $(id).addEventListener("change", () => { state.shown = PER_PAGE; markGallery(); });
    $("view").addEventListener("change", fillGallery);
    $("more").addEventListener("click", () => { state.shown += PER_PAGE; markGallery(); });
    let width = window.innerWidth;
    window.addEventListener("resize", () => {
      if (state.cell && window.innerWidth !== width) { width = window.innerWidth; showThreshold(); drawCurves(); }
    });
  }

  startLeaderboard();
  startCategory();
  startViewer();
  drawScale();
  window.addEventListener("hashchange", () => route(true));
  route(false);
  document.documentElement.dataset.ready = Math.round(performance.now()); // milliseconds until the page answered
})();
