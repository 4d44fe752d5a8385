"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const clauses = Object.fromEntries(data.clauses.map((each) => [each.id, each]));
  const cases = Object.fromEntries(data.cases.map((each) => [each.id, each]));
  const checks = data.judgements.map((each) => {
    const about = cases[each.case];
    const text = [each.subject, each.case, about.comment, about.catches, about.source, each.message, clauses[about.clause].text];
    return { ...each, about, text: text.join("\n").toLowerCase() };
  });
  const form = document.getElementById("filters");
  const dialog = document.getElementById("cell");
  const title = document.getElementById("cell-title");
  const body = document.getElementById("cell-body");
  const words = { pass: "passes", fail: "fails", skip: "skipped", differs: "differs where it may" };
  const icons = { pass: "✓", fail: "✗", skip: "–", differs: "≈" };
  const order = ["fail", "differs", "pass", "skip"];

  /** An element with attributes and children; text never becomes markup. */
  function make(name, attributes = {}, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children.filter((child) => child !== null));
    return element;
  }

  function filtered() {
    const wanted = Object.fromEntries(new FormData(form));
    const parts = wanted.text.toLowerCase().split(/\s+/).filter(Boolean);
    return checks.filter((each) =>
      (!wanted.backend || each.subject.split("/")[0] === wanted.backend) &&
      (!wanted.status || each.status === wanted.status) &&
      (!wanted.clause || each.about.clause === wanted.clause) &&
      parts.every((part) => each.text.includes(part)));
  }

  /** Rows, columns and cells without a check that matches are hidden. */
  function show() {
    const found = filtered();
    const rows = new Set(found.map((each) => each.about.clause));
    const columns = new Set(found.map((each) => each.subject));
    const cells = new Set(found.map((each) => `${each.about.clause} ${each.subject}`));
    for (const row of document.querySelectorAll(".matrix tr[data-clause]")) row.hidden = !rows.has(row.dataset.clause);
    for (const each of document.querySelectorAll(".matrix [data-subject]")) {
      if (each.matches("th, td")) each.hidden = !columns.has(each.dataset.subject);
      else each.style.visibility = cells.has(`${each.dataset.clause} ${each.dataset.subject}`) ? "" : "hidden";
    }
    const count = (n, one) => `${n} ${one}${n === 1 ? "" : "s"}`;
    document.getElementById("shown").textContent = found.length
      ? `${count(found.length, "check")} of ${count(columns.size, "subject")}, ${count(rows.size, "clause")}`
      : "No check matches these filters.";
  }

  function percent(part) {
    return part < 0.01 ? "<1 %" : `${(100 * part).toFixed(0)} %`;
  }

  function short(value) {
    if (value === null) return "no number";
    if (value === 0 || (value >= 0.01 && value < 1e4)) return String(Number(value.toPrecision(2)));
    return value.toExponential(0).replace("e+", "e");
  }

  function about(check) {
    if (check.status !== "pass") return words[check.status];
    if (!check.part) return words.pass;
    return `${percent(check.part)} of its bound, ${short(check.ulp)} ulp`;
  }

  /** Why a case without numbers passes. */
  function wordless(check) {
    if (check.about.verdict === "must raise") return "It raised an error that says why, and kept its state, as it must.";
    if (check.about.against === "bits") return "All bits are those of multibn.reference, in two runs.";
    if (check.part) return `Its worst error is ${about(check)}.`;
    return "It answered as it must, and what must stay as it was has the very bits that it had.";
  }

  function numbers(results) {
    const head = ["result", "step", "what came", "what should have come", "ulp", "of bound"];
    const rows = results.map((each) => make("tr", {},
      make("th", { scope: "row" }, make("code", {}, `${each.result}[${each.index.join(", ")}]`)),
      make("td", {}, each.where),
      make("td", {}, make("code", {}, each.came)),
      make("td", {}, make("code", {}, each.should_be)),
      make("td", {}, short(each.ulp)),
      make("td", {}, each.part === null ? "beyond" : each.part > 1 ? `${each.part.toPrecision(3)} ×` : percent(each.part))));
    const table = make("table", {},
      make("thead", {}, make("tr", {}, ...head.map((each) => make("th", { scope: "col" }, each)))),
      make("tbody", {}, ...rows));
    const about = "Of each result the value nearest to its bound, or farthest beyond it, and the worst error in ulp of all.";
    return make("div", {}, make("p", { class: "muted small" }, about),
      make("div", { class: "scroll", role: "region", "aria-label": "The numbers", tabindex: "0" }, table));
  }

  function snippet(text) {
    return make("div", { class: "snippet" },
      make("pre", { tabindex: "0", "aria-label": "Python that runs this case again" }, text),
      make("button", { type: "button", class: "copy" }, "Copy"));
  }

  function caseOf(check) {
    const inside = make("div", { class: "case-body" },
      make("p", {}, `${check.about.comment} It catches a ${check.about.clause.startsWith("WH") ? "whitening" : "BatchNorm"} that ${check.about.catches}. Source: ${check.about.source}.`));
    if (check.came !== null && check.status !== "skip") {
      inside.append(make("dl", { class: "both" },
        make("div", {}, make("dt", {}, "What came"), make("dd", {}, check.came)),
        make("div", {}, make("dt", {}, "What should have come"), make("dd", {}, check.should_be))));
    }
    if (check.message) inside.append(make("p", { class: "message" }, check.message));
    if (check.results.length) inside.append(numbers(check.results));
    else if (check.status === "pass") inside.append(make("p", {}, wordless(check)));
    inside.append(make("details", {},
      make("summary", {}, "The calls"),
      make("p", {}, make("code", {}, `${check.about.code}, ${check.about.features} features`)),
      make("ol", { class: "calls" }, ...check.about.steps.map((each) => make("li", {}, each)))));
    if (check.snippet) inside.append(snippet(check.snippet));
    const icon = make("span", { class: `icon ${check.status}`, "aria-hidden": "true" }, icons[check.status]);
    const summary = make("summary", {}, icon, make("code", {}, check.case), " ", make("span", { class: "case-about" }, about(check)));
    const details = make("details", { class: "case" }, summary, inside);
    details.open = check.status === "fail";
    return details;
  }

  function open(clause, subject) {
    const all = checks.filter((each) => each.about.clause === clause && each.subject === subject);
    const wanted = new Set(filtered());
    const matching = all.filter((each) => wanted.has(each));
    const found = matching.length ? matching : all;
    found.sort((a, b) => order.indexOf(a.status) - order.indexOf(b.status));
    // a narrow line breaks between the parts of a name, not inside one
    const parts = subject.split("/").flatMap((part, i) => (i ? ["/", make("wbr"), part] : [part]));
    title.replaceChildren(`${clause} ${clauses[clause].title}: `, ...parts);
    const count = found.length === all.length ? `${all.length}` : `${found.length} of ${all.length}`;
    const rest = found.map(caseOf);
    if (!found.some((each) => each.status === "fail") && rest.length) rest[0].open = true;
    body.replaceChildren(
      make("p", {}, clauses[clause].text),
      make("p", { class: "muted" }, `${count} ${all.length === 1 ? "case" : "cases"}${found.length < all.length ? ", as filtered" : ""}`),
      ...rest);
    dialog.showModal();
    dialog.scrollTop = 0;
    title.focus();
  }

  document.addEventListener("click", async (event) => {
    const opener = event.target.closest("[data-opens]");
    if (opener) open(opener.dataset.clause, opener.dataset.subject);
    const copier = event.target.closest(".copy");
    if (copier) {
      try {
        await navigator.clipboard.writeText(copier.previousElementSibling.textContent);
        copier.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(copier.previousElementSibling);
        copier.textContent = "Selected";
      }
    }
    if (event.target === dialog || event.target.closest("#close")) dialog.close();
  });

  /** Arrows move between cells. */
  document.querySelector(".matrix").addEventListener("keydown", (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const move = moves[event.key];
    const cell = event.target.closest(".cell");
    if (!move || !cell) return;
    event.preventDefault();
    const rows = [...document.querySelectorAll(".matrix tbody tr:not([hidden])")];
    const places = rows.map((row) => [...row.querySelectorAll("td:not([hidden])")].map((td) => td.querySelector(".cell")));
    let row = places.findIndex((each) => each.includes(cell));
    let column = places[row].indexOf(cell);
    do {
      row += move[0];
      column += move[1];
      const next = places[row]?.[column];
      if (next && next.style.visibility !== "hidden") return next.focus();
    } while (row >= 0 && row < places.length && column >= 0 && column < places[0].length);
  });

  form.addEventListener("input", show);
  form.addEventListener("reset", () => setTimeout(show));
  form.addEventListener("submit", (event) => event.preventDefault());
  show();
})();
