"use strict";
// Shows the JSON that stands in the page, one page of problems at a time. What a model wrote becomes text by
// textContent alone, never markup; formulas become MathML, element by element, of trees that report/mathematics.py made.
(() => {
  const PER_PAGE = 10;
  const PRINTED = 100;
  const data = JSON.parse(document.getElementById("data").textContent);
  const { arms, benchmarks, outcomes, finishes, problems } = data;
  const formulas = new Map(Object.entries(data.formulas));
  const formula = new RegExp(data.formula, "g");
  const MATHML = "http://www.w3.org/1998/Math/MathML";
  const TOKENS = { i: "mi", n: "mn", o: "mo", t: "mtext", p: "mo" };
  const form = document.getElementById("filters");
  const benchmark = document.getElementById("benchmark");
  const text = document.getElementById("text");
  const outcomeOf = [...form.querySelectorAll("select[data-arm]")];
  const shown = [...form.querySelectorAll("input[data-arm]")];
  const heading = document.getElementById("found");
  const status = document.getElementById("status");
  const view = document.getElementById("view");
  const list = document.getElementById("problems");
  const pagers = [...document.querySelectorAll("nav.pager")];
  let matches = [];
  let page = 0;
  let haystacks = null;

  const number = (value) => value.toLocaleString("en");

  function element(tag, className, content) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (content !== undefined) made.textContent = content;
    return made;
  }

  function mathElement(node) {
    if (typeof node === "string") {
      const token = document.createElementNS(MATHML, TOKENS[node[0]]);
      token.textContent = node.slice(1);
      if (node[0] === "p") token.setAttribute("stretchy", "false");
      return token;
    }
    const [tag, ...rest] = node;
    const made = document.createElementNS(MATHML, tag);
    const attributes = rest.length && typeof rest[0] === "object" && !Array.isArray(rest[0]) ? rest.shift() : {};
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...(/^m([ino]|text)$/.test(tag) ? rest : rest.map(mathElement)));
    return made;
  }

  // A `math` for each piece, so that a line can end between two; as written, it stands in the title.
  function mathematics(source) {
    const made = element("span", "formula");
    made.title = source;
    for (const piece of formulas.get(source)) {
      const math = document.createElementNS(MATHML, "math");
      if (/^(\$\$|\\\[)/.test(source)) math.setAttribute("displaystyle", "true");
      math.append(mathElement(piece));
      made.append(math);
    }
    return made;
  }

  // The text, with its formulas as far as they could be converted.
  function readable(value) {
    if (formulas.has(value)) return [mathematics(value)];
    const parts = [];
    let from = 0;
    for (const { 0: source, index } of value.matchAll(formula)) {
      if (!formulas.has(source)) continue;
      parts.push(value.slice(from, index), mathematics(source));
      from = index + source.length;
    }
    return [...parts, value.slice(from)];
  }

  // A text is a string, or [its start, how many characters are left out, its end].
  const pieces = (value) => (typeof value === "string" ? [value] : [value[0], value[2]]);

  const tests = {
    all: (found) => found.every((outcome) => outcome === 0),
    some: (found) => found.some((outcome) => outcome === 0),
    lacking: (found) => found.some((outcome) => outcome !== 0),
    none: (found) => found.every((outcome) => outcome !== 0),
  };

  function matching(wanted, found) {
    if (found.length === 0) return false;
    return wanted in tests ? tests[wanted](found) : found.includes(Number(wanted));
  }

  function haystack(problem) {
    const [, id, prompt, gold, answers] = problem;
    const every = answers.flatMap((ofArm) => ofArm.flatMap(([, , , extracted, , , answer]) => [extracted ?? "", ...pieces(answer)]));
    return [id, prompt, gold, ...every].join("\n").toLowerCase();
  }

  function filtered() {
    const needle = text.value.trim().toLowerCase();
    if (needle && haystacks === null) haystacks = problems.map(haystack);
    const wanted = outcomeOf.map((select) => [Number(select.dataset.arm), select.value]).filter(([, value]) => value);
    return [...problems.keys()].filter((index) => {
      const [of, , , , answers] = problems[index];
      return (
        (benchmark.value === "" || of === Number(benchmark.value)) &&
        wanted.every(([arm, value]) => matching(value, answers[arm].map((answer) => answer[2]))) &&
        (!needle || haystacks[index].includes(needle))
      );
    });
  }

  function describedView() {
    const parts = [benchmark.value === "" ? "all benchmarks" : benchmarks[Number(benchmark.value)].name];
    for (const select of outcomeOf) {
      if (select.value) parts.push(`${arms[Number(select.dataset.arm)].name}: ${select.selectedOptions[0].textContent}`);
    }
    if (text.value.trim()) parts.push(`text “${text.value.trim()}”`);
    const hidden = shown.filter((box) => !box.checked).map((box) => arms[Number(box.dataset.arm)].name);
    if (hidden.length) parts.push(`not shown: ${hidden.join(", ")}`);
    return `Shown: ${parts.join("; ")}.`;
  }

  function textBlock(value, where) {
    const block = element("div", "text");
    block.dir = "auto";
    if (typeof value === "string") {
      block.append(...readable(value));
      return block;
    }
    const [start, omitted, end] = value;
    const cut = element("em", "cut", `[${number(omitted)} characters are left out here; the whole answer: ${where}]`);
    block.append(...readable(start), cut, ...readable(end));
    return block;
  }

  // Answers that are the same to the letter stand once, with the runs that gave them. Of one that is cut the middle
  // is not known here, so it stands by itself.
  function folded(answers) {
    const groups = new Map();
    answers.forEach((answer, place) => {
      const key = typeof answer[6] === "string" ? JSON.stringify(answer.slice(2)) : place;
      if (groups.has(key)) groups.get(key).push(answer);
      else groups.set(key, [answer]);
    });
    return [...groups.values()];
  }

  function givenBy(arm, answers) {
    const several = arms[arm].samples > 1 || answers.some((answer) => answer[1] > 0);
    if (!several) return arms[arm].runs.length > 1 ? `run${answers.length > 1 ? "s" : ""} ${answers.map((answer) => answer[0] + 1).join(", ")}` : "";
    const one = ([run, sample]) => (arms[arm].runs.length > 1 ? `run ${run + 1}, ` : "") + `sample ${sample + 1}`;
    return answers.map(one).join("; ");
  }

  function answerBlock(arm, of, answers) {
    const [run, , outcome, extracted, tokens, finish, written, others] = answers[0];
    const { sign, name } = outcomes[outcome];
    const block = element("div", `answer ${outcome === 0 ? "right" : "not-right"}`);
    const by = givenBy(arm, answers);
    const verdict = element("p", "verdict");
    const mark = element("span", "sign", sign);
    mark.setAttribute("aria-hidden", "true");
    verdict.append(mark, " ", element("b", "", name), by ? ` · ${by}` : "");
    const facts = element("p", "facts");
    facts.append("Read as ");
    const read = element("span", "read");
    read.append(...(extracted === null ? ["no final answer"] : readable(extracted)));
    if (extracted !== null) read.dir = "auto";
    facts.append(read, ` · ${number(tokens)} tokens · ${finishes[finish]}`);
    block.append(verdict, facts);
    if (others) {
      const said = Object.entries(others).map(([rule, right]) => `${rule}: ${right === null ? "undecided" : right ? "right" : "not right"}`);
      block.append(element("p", "facts", `Other rules differ. ${said.join("; ")}`));
    }
    const line = `${arms[arm].runs[run]}/${benchmarks[of].file}`;
    block.append(textBlock(written, line));
    return block;
  }

  function problemBlock(index) {
    const [of, id, prompt, gold, answers] = problems[index];
    const article = element("article", "problem");
    const title = element("h3", "", `${benchmarks[of].name}: ${id}`);
    title.id = `problem-${index}`;
    article.setAttribute("aria-labelledby", title.id);
    const asked = element("div", "asked");
    asked.dir = "auto";
    asked.append(...readable(prompt));
    const goldLine = element("p", "gold", "Gold answer: ");
    const goldText = element("b");
    goldText.dir = "auto";
    goldText.append(...readable(gold));
    goldLine.append(goldText);
    const grid = element("div", "arms");
    for (const box of shown) {
      if (!box.checked) continue;
      const arm = Number(box.dataset.arm);
      const column = element("div", `arm arm-${arm}`);
      column.setAttribute("role", "group");
      const name = element("h4", "", arms[arm].name);
      name.id = `problem-${index}-arm-${arm}`;
      column.setAttribute("aria-labelledby", name.id);
      column.append(name);
      if (answers[arm].length === 0) column.append(element("p", "facts", "no graded rows at hand"));
      for (const same of folded(answers[arm])) column.append(answerBlock(arm, of, same));
      grid.append(column);
    }
    article.append(title, asked, goldLine, grid);
    return article;
  }

  // Only what scrolls needs a place in the order of focus.
  function makeScrollersFocusable() {
    for (const block of list.querySelectorAll(".text, .asked")) {
      if (block.scrollHeight <= block.clientHeight + 1 && block.scrollWidth <= block.clientWidth) continue;
      const arm = block.closest(".arm");
      block.tabIndex = 0;
      block.setAttribute("role", "group");
      block.setAttribute("aria-label", arm ? `Answer of ${arm.querySelector("h4").textContent}` : "Problem");
    }
  }

  function show(indices) {
    list.replaceChildren(...indices.map(problemBlock));
    makeScrollersFocusable();
  }

  function tell(range) {
    status.textContent = matches.length
      ? `${number(matches.length)} of ${number(problems.length)} problems${range}`
      : problems.length
        ? `No problem of ${number(problems.length)} fits. Loosen or clear the filters.`
        : "Nothing to show: no graded rows were at hand.";
    view.textContent = describedView();
  }

  function showPage() {
    const pages = Math.max(1, Math.ceil(matches.length / PER_PAGE));
    page = Math.min(page, pages - 1);
    const first = page * PER_PAGE;
    const indices = matches.slice(first, first + PER_PAGE);
    show(indices);
    const part = indices.length < matches.length;
    tell(part ? `; showing ${number(first + 1)} to ${number(first + indices.length)}` : "");
    for (const pager of pagers) {
      pager.hidden = pages === 1;
      pager.querySelector(".previous").disabled = page === 0;
      pager.querySelector(".next").disabled = page === pages - 1;
      pager.querySelector(".place").textContent = `Page ${number(page + 1)} of ${number(pages)}`;
    }
  }

  // The address holds the filters and the page, so that a link shows what its sender saw.
  function keepInAddress() {
    const kept = new URLSearchParams();
    if (benchmark.value !== "") kept.set("benchmark", benchmarks[Number(benchmark.value)].name);
    if (text.value.trim()) kept.set("text", text.value.trim());
    for (const select of outcomeOf) if (select.value) kept.append("outcome", `${select.value}:${arms[Number(select.dataset.arm)].name}`);
    for (const box of shown) if (!box.checked) kept.append("hidden", arms[Number(box.dataset.arm)].name);
    if (page) kept.set("page", page + 1);
    const wanted = [...kept].length ? `#${kept}` : "";
    if (wanted !== location.hash && (wanted || location.hash.includes("="))) history.replaceState(null, "", wanted || "#found");
  }

  // What the address names and this page lacks is left out.
  function readAddress() {
    const kept = new URLSearchParams(location.hash.slice(1));
    const of = benchmarks.findIndex(({ name }) => name === kept.get("benchmark"));
    benchmark.value = of < 0 ? "" : String(of);
    text.value = kept.get("text") ?? "";
    for (const select of outcomeOf) {
      const name = arms[Number(select.dataset.arm)].name;
      const options = [...select.options].map((option) => option.value);
      select.value = options.find((value) => value && kept.getAll("outcome").includes(`${value}:${name}`)) ?? "";
    }
    for (const box of shown) box.checked = !kept.getAll("hidden").includes(arms[Number(box.dataset.arm)].name);
    matches = filtered();
    page = Math.max(0, Math.floor(Number(kept.get("page"))) - 1) || 0;
    showPage();
  }

  function update() {
    matches = filtered();
    page = 0;
    showPage();
    keepInAddress();
  }

  function turn(by) {
    page += by;
    showPage();
    keepInAddress();
    heading.focus(); // the new problems stand below it
  }

  let waiting = 0;
  form.addEventListener("input", (event) => {
    clearTimeout(waiting);
    if (event.target === text) waiting = setTimeout(update, 200); // a search per word, not per key
    else update();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(waiting);
    update();
  });
  form.addEventListener("reset", () => setTimeout(update)); // after the controls have their first values
  for (const pager of pagers) {
    pager.querySelector(".previous").addEventListener("click", () => turn(-1));
    pager.querySelector(".next").addEventListener("click", () => turn(1));
  }
  // Paper has no pages to turn: all that the filters leave is printed, up to a number.
  addEventListener("beforeprint", () => {
    show(matches.slice(0, PRINTED));
    tell(matches.length > PRINTED ? `; printed are the first ${PRINTED}` : "");
  });
  addEventListener("afterprint", showPage);

  addEventListener("hashchange", () => {
    if (location.hash === "" || location.hash.includes("=")) readAddress(); // others are places in this page
  });

  document.getElementById("browser").hidden = false;
  readAddress();
})();
