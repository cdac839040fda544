// The table of modules: sorted by a column's button, filtered by text and by kind, rows chosen for the trajectories.
const rows = [...document.querySelectorAll("#table tbody tr")];
const numberIn = (cell) => {
  const found = parseFloat(cell.textContent.replace("▼", ""));
  return Number.isNaN(found) ? null : found;
};

function sortRows(header) {
  const column = [...header.parentNode.children].indexOf(header);
  const descending = header.getAttribute("aria-sort") === "ascending";
  for (const other of header.parentNode.children) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const numeric = header.classList.contains("number");
  const keys = new Map(rows.map((row) => [row, numeric ? numberIn(row.cells[column]) : row.cells[column].textContent]));
  const order = (a, b) => {
    const [x, y] = [keys.get(a), keys.get(b)];
    // What has no number stays at the end, whichever way the others go.
    if (x === null || y === null) return (x === null) - (y === null);
    const sign = numeric ? x - y : x.localeCompare(y, undefined, { numeric: true });
    return descending ? -sign : sign;
  };
  document.querySelector("#table tbody").append(...[...rows].sort(order));
}

const KINDS = {
  all: () => true,
  below: (row) => parseFloat(row.dataset.margin) < 0,
  merged: (row) => row.dataset.merges !== "0",
  undone: (row) => row.dataset.undone !== "0",
  odd: (row) => row.dataset.state !== "measured",
};

function filterRows() {
  const words = byId("find").value.toLowerCase().split(/\s+/).filter(Boolean);
  const fits = KINDS[byId("which").value];
  let count = 0;
  for (const row of rows) {
    const text = `${row.cells[1].textContent} ${row.cells[row.cells.length - 1].textContent}`.toLowerCase();
    row.hidden = !(fits(row) && words.every((word) => text.includes(word)));
    count += row.hidden ? 0 : 1;
  }
  byId("count").textContent = count === rows.length ? `${count} modules` : `${count} of ${rows.length} modules`;
}

function moduleTable() {
  for (const header of document.querySelectorAll("#table th[data-key]")) header.querySelector("button").addEventListener("click", () => sortRows(header));
  byId("find").addEventListener("input", filterRows);
  byId("which").addEventListener("change", filterRows);
  for (const row of rows) {
    const box = row.querySelector("input");
    box.addEventListener("change", () => choose(Number(row.dataset.index), box.checked));
    watchers.push(() => {
      box.checked = chosen.has(Number(row.dataset.index));
    });
  }
}
