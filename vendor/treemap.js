// What the page needs of echarts: one kind of chart. The whole of it is three times as large.
import { init, use } from "echarts/core.js";
import { TreemapChart } from "echarts/charts.js";
import { CanvasRenderer } from "echarts/renderers.js";

use([TreemapChart, CanvasRenderer]);

export { init };
