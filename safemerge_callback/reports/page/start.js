if (run.modules.length) {
  moduleTable();
  heatMap();
  curves();
}
probeCurves();
