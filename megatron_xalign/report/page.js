"use strict";
/* Values under the pointer, and the film of projections. The page is complete without it. */

(function hover() {
  const told = document.createElement("div");
  told.className = "told";
  told.hidden = true;
  document.body.append(told);
  const reach = 22; /* pixels */
  for (const svg of document.querySelectorAll("svg[data-points]")) {
    const points = JSON.parse(svg.dataset.points);
    const box = svg.viewBox.baseVal;
    const show = (event) => {
      const frame = svg.getBoundingClientRect();
      const scale = frame.width / box.width;
      const x = (event.clientX - frame.left) / scale, y = (event.clientY - frame.top) / scale;
      let nearest = null, least = reach / scale;
      for (const point of points) {
        const away = Math.hypot(point[0] - x, point[1] - y);
        if (away < least) { least = away; nearest = point; }
      }
      told.hidden = nearest === null;
      if (nearest === null) return;
      told.textContent = nearest[2];
      const left = frame.left + nearest[0] * scale + 12, top = frame.top + nearest[1] * scale - 12;
      told.style.left = Math.max(4, Math.min(left, innerWidth - told.offsetWidth - 8)) + scrollX + "px";
      told.style.top = Math.max(4, top - told.offsetHeight) + scrollY + "px";
    };
    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", () => { told.hidden = true; });
  }
})();

(function film() {
  const place = document.getElementById("film");
  if (place === null) return;
  const data = JSON.parse(document.getElementById("film-data").textContent);
  const bytes = data.runs.map((run) => Uint8Array.from(
    atob(run.points.replaceAll("-", "+").replaceAll("_", "/")), (letter) => letter.charCodeAt(0)));
  const step = document.getElementById("film-step"), layer = document.getElementById("film-layer");
  const play = document.getElementById("film-play"), where = document.getElementById("film-where");
  const perFrame = data.languages.length * 2;
  place.hidden = false;

  function draw() {
    const t = Number(step.value), l = Number(layer.value);
    const name = l === 0 ? "embedding" : "layer " + (l - 1);
    where.textContent = "step " + data.steps[t].toLocaleString("en") + ", " + name;
    const style = getComputedStyle(document.documentElement);
    const colors = data.colors.map((variable) => style.getPropertyValue(variable).trim());
    data.runs.forEach((run, number) => {
      const canvas = document.getElementById("film-" + number);
      const side = Math.round(canvas.clientWidth * devicePixelRatio);
      canvas.width = canvas.height = side;
      const context = canvas.getContext("2d");
      const radius = Math.max(1.5, side / 130), room = side - 4 * radius;
      const start = (t * data.layers + l) * perFrame;
      context.globalAlpha = 0.6;
      /* Interleaved, so that no language lies on top of the other. */
      const order = data.order;
      for (const index of order) {
        context.fillStyle = colors[data.languages[index]];
        context.beginPath();
        const x = bytes[number][start + 2 * index] / 255, y = 1 - bytes[number][start + 2 * index + 1] / 255;
        context.arc(2 * radius + x * room, 2 * radius + y * room, radius, 0, 2 * Math.PI);
        context.fill();
      }
      const apart = run.silhouette[t][l];
      document.getElementById("film-told-" + number).textContent =
        apart === null ? "" : "silhouette " + apart.toFixed(2).replace("-", "\u2212");
    });
  }

  let timer = null;
  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }
  play.addEventListener("click", () => {
    if (timer !== null) { stop(); return; }
    if (Number(step.value) === data.steps.length - 1) step.value = 0;
    play.textContent = "Stop";
    timer = setInterval(() => {
      if (Number(step.value) === data.steps.length - 1) { stop(); return; }
      step.value = Number(step.value) + 1;
      draw();
    }, 500);
    draw();
  });
  step.addEventListener("input", draw);
  layer.addEventListener("input", draw);
  addEventListener("resize", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
})();
