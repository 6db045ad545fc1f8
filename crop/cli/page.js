// The box on the picture, and where to look after a question. The field #box holds it as text; a drag on #picture writes that text, and what the text says is drawn.
() => {
  const picture = document.querySelector("#picture");
  const layer = Object.assign(document.createElement("div"), { id: "boxes" });
  picture.append(layer);
  let start = null; // corner where a drag began

  // Where the picture itself is shown, in pixels of the page: its element may be larger.
  const shown = () => {
    const image = picture.querySelector("img");
    if (!image?.naturalWidth) return null;
    const { left, top, width, height } = image.getBoundingClientRect();
    const scale = Math.min(width / image.naturalWidth, height / image.naturalHeight);
    const [w, h] = [image.naturalWidth * scale, image.naturalHeight * scale];
    return { left: left + (width - w) / 2, top: top + (height - h) / 2, width: w, height: h, image };
  };
  const field = () => document.querySelector("#box :is(input, textarea)");
  const write = (text) => {
    field().value = text;
    field().dispatchEvent(new Event("input", { bubbles: true }));
  };
  const corner = (event, at) =>
    [(event.clientX - at.left) / at.width, (event.clientY - at.top) / at.height].map((v) => Math.min(Math.max(v, 0), 1));

  const draw = () => {
    const at = shown();
    layer.replaceChildren();
    if (!at) return;
    const around = picture.getBoundingClientRect();
    layer.style.cssText = `left:${at.left - around.left}px;top:${at.top - around.top}px;width:${at.width}px;height:${at.height}px`;
    const pixels = field().value.startsWith("px:");
    const [width, height] = pixels ? [at.image.naturalWidth, at.image.naturalHeight] : [1, 1];
    for (const part of field().value.replace("px:", "").split("+")) {
      const [x0, y0, x1, y1] = part.split(",").map(Number);
      if (!(x0 < x1 && y0 < y1)) continue; // not yet a box; asking says what is wrong with it
      const box = document.createElement("div");
      const percent = { left: x0 / width, top: y0 / height, width: (x1 - x0) / width, height: (y1 - y0) / height };
      for (const [name, value] of Object.entries(percent)) box.style[name] = `${100 * value}%`;
      layer.append(box);
    }
  };

  picture.addEventListener("dragstart", (event) => event.preventDefault());
  picture.addEventListener("pointerdown", (event) => {
    if (event.target.tagName !== "IMG" || event.button) return;
    start = corner(event, shown());
    event.target.setPointerCapture(event.pointerId);
    write(""); // a click alone takes the box away
  });
  picture.addEventListener("pointermove", (event) => {
    if (!start) return;
    const [x, y] = corner(event, shown());
    const [x0, x1, y0, y1] = [Math.min(start[0], x), Math.max(start[0], x), Math.min(start[1], y), Math.max(start[1], y)];
    if (x1 - x0 > 0.005 && y1 - y0 > 0.005) write([x0, y0, x1, y1].map((value) => value.toFixed(3)).join(","));
  });
  for (const end of ["pointerup", "pointercancel"]) picture.addEventListener(end, () => (start = null));
  picture.addEventListener("load", draw, true);
  new ResizeObserver(draw).observe(picture);
  window.drawBoxes = draw;
  window.showAnswers = () => { // on a narrow page they are below
    const answers = document.querySelector("#answers");
    const { top } = answers.getBoundingClientRect();
    if (top < 0 || top > window.innerHeight / 2) answers.scrollIntoView({ behavior: "smooth" });
  };
}
