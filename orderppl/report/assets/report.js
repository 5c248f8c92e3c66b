"use strict";
// Replays recordings: `done` steps are shown in both panes at once; a position is visible once its step is below `done`,
// and from the start where its step is GIVEN.
(() => {
  const MASK = "\u00b7"; // shown where a token is masked
  const GIVEN = -1; // step of a position that is not revealed but given
  const PAUSE = 900; // milliseconds between two steps of play
  const KINDS = {
    decode: "decoding: tokens of the denoiser",
    follow: "held-out row: true tokens along the policy's order",
  };
  const find = (id) => document.getElementById(id);
  const parts = JSON.parse(find("recordings").textContent).parts;
  const view = { part: parts[0], problem: null, kind: "decode", done: 0, timer: null };
  const panes = [0, 1].map((index) => ({ index, arm: null, recording: null, chosen: 0, pinned: false, cells: [] }));

  function make(name, text = "", properties = {}) {
    const element = document.createElement(name);
    element.textContent = text;
    return Object.assign(element, properties);
  }

  // Token strings are data: white space gets a sign, and everything goes in as text.
  function spelt(token) {
    const text = view.part.spelling[token];
    return text === "" ? "\u2205" : text.replace(/\n/g, "\u23ce").replace(/\t/g, "\u21e5").replace(/ /g, "\u2423");
  }

  const probability = (p) => (p < 0.0005 ? p.toExponential(1) : p.toFixed(3));
  const nats = (value) => (value === null ? "\u221e" : value.toFixed(3)); // JSON has no infinity
  const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
  const forwards = (pane) => pane.recording.steps.length;
  const longest = () => Math.max(...panes.map(forwards));

  // ------------------------------------------------------------------------------------------------------------ choices

  function fill(select, labels, value) {
    select.replaceChildren(...labels.map(([key, label]) => make("option", label, { value: key })));
    if (labels.some(([key]) => String(key) === String(value))) select.value = value;
    return select.value;
  }

  function choosePart(index) {
    view.part = parts[index];
    const rows = view.part.problems.map((problem, k) => {
      return [k, `${view.part.split} row ${problem.row}, ${plural(problem.size, "token")}`];
    });
    chooseProblem(fill(find("problem"), rows, 0));
  }

  function chooseProblem(index) {
    view.problem = view.part.problems[index];
    find("prompt").textContent = view.problem.prompt ?? "";
    chooseKind(fill(find("kind"), Object.entries(KINDS), view.kind));
  }

  function chooseKind(kind) {
    view.kind = kind;
    const names = view.part.arms.map((arm) => arm.name).filter((name) => kind in view.problem.recordings[name]);
    for (const pane of panes) {
      const other = names.find((name) => name.startsWith("entropy")) ?? names[names.length - 1];
      const wanted = names.includes(pane.arm) ? pane.arm : [names[0], other][pane.index];
      pane.arm = fill(find(`arm-${pane.index}`), names.map((name) => [name, name]), wanted);
    }
    load();
  }

  function load(done = 0) {
    pause();
    for (const pane of panes) {
      pane.recording = view.problem.recordings[pane.arm][view.kind];
      pane.chosen = Math.max(pane.recording.step.findIndex((step) => step !== GIVEN), 0);
      pane.pinned = false; // a token that was pointed at stays chosen; else the first new one of each step is
      drawTokens(pane);
    }
    find("slider").max = longest();
    show(done, false);
  }

  // ------------------------------------------------------------------------------------------------------------ drawing

  function drawTokens(pane) {
    const tokens = find(`tokens-${pane.index}`);
    pane.cells = pane.recording.tokens.map((_, position) => {
      const cell = make("div", "", { className: "token", id: `token-${pane.index}-${position}` });
      cell.setAttribute("role", "option");
      const step = pane.recording.step[position];
      cell.classList.toggle("given", step === GIVEN);
      cell.style.setProperty("--tone", `${(100 * step) / Math.max(forwards(pane) - 1, 1)}%`);
      cell.append(make("span"), make("small", step === GIVEN ? "\u00a0" : String(step + 1)));
      cell.addEventListener("click", () => pin(pane, position));
      return cell;
    });
    tokens.replaceChildren(...pane.cells);
  }

  function show(done, announce = true) {
    view.done = Math.min(Math.max(done, 0), longest());
    const position = `Step ${view.done} of ${longest()}`;
    find("slider").value = view.done;
    find("slider").setAttribute("aria-valuetext", position);
    find("position").value = position;
    for (const id of ["first", "back"]) find(id).setAttribute("aria-disabled", String(view.done === 0));
    for (const id of ["next", "last"]) find(id).setAttribute("aria-disabled", String(view.done === longest()));
    panes.forEach(drawPane);
    if (announce) find("announcement").textContent = `${position}. ${panes.map(spoken).join(" ")}`;
  }

  function drawPane(pane) {
    const { recording } = pane;
    pane.cells.forEach((cell, position) => {
      const step = recording.step[position];
      const visible = step < view.done;
      const when = step === GIVEN ? "given" : `step ${step + 1}`;
      const name = visible ? `${spelt(recording.tokens[position])}, ${when}` : "masked";
      cell.firstChild.textContent = visible ? spelt(recording.tokens[position]) : MASK;
      cell.classList.toggle("masked", !visible);
      cell.classList.toggle("fresh", step !== GIVEN && step === view.done - 1);
      cell.setAttribute("aria-label", `position ${position + 1}: ${name}`);
    });
    find(`outcome-${pane.index}`).textContent = outcome(pane);
    drawSteps(pane);
    const newest = view.done === 0 ? -1 : recording.step.indexOf(view.done - 1);
    choose(pane, pane.pinned || newest < 0 ? pane.chosen : newest);
  }

  function pin(pane, position) {
    pane.pinned = true;
    choose(pane, position);
  }

  function outcome(pane) {
    const { recording } = pane;
    if (view.done === 0) return `${plural(view.problem.size, "token")}, all masked.`;
    if (view.done < forwards(pane)) return `Step ${view.done}: ${gained(recording.steps[view.done - 1])}`;
    const total = `${nats(recording.total_nats)} nats in all`;
    const verdict = recording.correct === undefined ? "" : recording.correct ? " The answer is right." : " The answer is wrong.";
    return `Finished after ${plural(recording.forwards, "denoiser forward")}: ${total}.${verdict}`;
  }

  function gained(step) {
    return `revealed ${plural(step.tokens, "token")}, mean probability ${probability(step.probability)}.`;
  }

  function spoken(pane) {
    const step = pane.recording.steps[view.done - 1];
    if (view.done === 0) return `${pane.arm}: all masked.`;
    if (step === undefined) return `${pane.arm}: finished before.`;
    return `${pane.arm}: ${gained(step)}`;
  }

  function drawSteps(pane) {
    const head = make("tr");
    head.append(...["step", "tokens", "mean probability", "nats"].map((name) => make("th", name, { scope: "col" })));
    const rows = pane.recording.steps.map((step, index) => {
      const row = make("tr");
      const numbers = [step.tokens, probability(step.probability), nats(step.nats)];
      row.append(make("th", String(index + 1), { scope: "row" }), ...numbers.map((text) => make("td", String(text))));
      row.classList.toggle("ahead", index >= view.done);
      if (index === view.done - 1) row.setAttribute("aria-current", "step");
      return row;
    });
    const table = make("table");
    const [top, body] = [make("thead"), make("tbody")];
    top.append(head);
    body.append(...rows);
    table.append(top, body);
    find(`steps-${pane.index}`).replaceChildren(table);
  }

  function choose(pane, position) {
    const { recording } = pane;
    pane.chosen = position;
    pane.cells.forEach((cell, index) => {
      cell.classList.toggle("chosen", index === position);
      cell.setAttribute("aria-selected", String(index === position));
    });
    const detail = find(`detail-${pane.index}`);
    if (!pane.cells.length) return detail.replaceChildren(make("p", "No tokens."));
    find(`tokens-${pane.index}`).setAttribute("aria-activedescendant", pane.cells[position].id);
    const step = recording.step[position];
    const where = `Position ${position + 1} of ${recording.tokens.length}`;
    if (step >= view.done) return detail.replaceChildren(make("p", `${where}: masked until step ${step + 1}.`));
    const own = recording.tokens[position];
    const first = make("p", `${where}: `);
    first.append(make("strong", spelt(own)));
    if (step === GIVEN) {
      first.append(", given.");
      return detail.replaceChildren(first);
    }
    const p = `probability ${probability(recording.probability[position])} (${nats(recording.nats[position])} nats)`;
    first.append(`, step ${step + 1}, ${p}`);
    const table = make("table", "", { className: "alternatives" });
    table.setAttribute("aria-label", `Most probable tokens at step ${step + 1}`);
    const body = make("tbody");
    for (const [token, share] of recording.alternatives[position]) {
      const row = make("tr", "", { className: token === own ? "own" : "" });
      const bar = make("div", "", { className: "bar" });
      const line = make("i");
      line.style.setProperty("--share", share);
      bar.append(line, probability(share));
      const cell = make("td");
      cell.append(bar);
      row.append(make("th", spelt(token), { scope: "row" }), cell);
      body.append(row);
    }
    table.append(body);
    return detail.replaceChildren(first, table);
  }

  // ------------------------------------------------------------------------------------------------------------ playing

  function pause() {
    clearInterval(view.timer);
    view.timer = null;
    find("play").textContent = "Play";
  }

  function play() {
    if (view.timer !== null) return pause();
    if (view.done === longest()) show(0, false);
    find("play").textContent = "Pause";
    view.timer = setInterval(() => {
      show(view.done + 1);
      if (view.done === longest()) pause();
    }, PAUSE);
  }

  function step(done) {
    pause();
    show(done);
  }

  function keys(event) {
    if (event.altKey || event.ctrlKey || event.metaKey || event.target.matches("select")) return;
    const pane = panes.find((candidate) => find(`tokens-${candidate.index}`) === event.target);
    const moves = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };
    const last = pane === undefined ? longest() : pane.cells.length - 1;
    const ends = { Home: 0, End: last };
    if (event.key === " " && !event.target.matches("button")) {
      play();
    } else if (event.key in ends || event.key in moves) {
      if (pane === undefined && /Up|Down/.test(event.key)) return;
      const from = pane === undefined ? view.done : pane.chosen;
      const to = event.key in ends ? ends[event.key] : Math.min(Math.max(from + moves[event.key], 0), last);
      if (pane === undefined) step(to);
      else pin(pane, to);
    } else {
      return;
    }
    event.preventDefault();
  }

  find("part").addEventListener("change", (event) => choosePart(event.target.value));
  find("problem").addEventListener("change", (event) => chooseProblem(event.target.value));
  find("kind").addEventListener("change", (event) => chooseKind(event.target.value));
  for (const pane of panes) {
    find(`arm-${pane.index}`).addEventListener("change", (event) => {
      pane.arm = event.target.value;
      load(view.done);
    });
  }
  find("first").addEventListener("click", () => step(0));
  find("back").addEventListener("click", () => step(view.done - 1));
  find("next").addEventListener("click", () => step(view.done + 1));
  find("last").addEventListener("click", () => step(longest()));
  find("play").addEventListener("click", play);
  find("slider").addEventListener("input", (event) => step(Number(event.target.value)));
  find("player").addEventListener("keydown", keys);

  choosePart(fill(find("part"), parts.map((part, index) => [index, part.name]), 0));
})();
