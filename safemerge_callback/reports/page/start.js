if (run.modules.length) {
  moduleTable();
  heatMap();
  curves();
}
termCurves();
probeCurves();
