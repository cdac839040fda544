if (run.modules.length) {
  moduleTable();
  if (byId("heat")) heatMap();
  curves();
}
termCurves();
probeCurves();
