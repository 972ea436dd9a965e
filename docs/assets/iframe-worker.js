// A browser starts no worker for a page that it opens from the disk: there, the search runs in an empty frame.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.appendChild(frame);
      this.inner = frame.contentWindow;
      this.waiting = [];
      window.addEventListener("message", (event) => {
        if (event.source === this.inner) this.dispatchEvent(new MessageEvent("message", { data: event.data }));
      });
      const start = `
        postMessage = (data) => parent.postMessage(data, "*");
        importScripts = (...urls) => Promise.all(urls.map((url) => new Promise((resolve) => {
          const script = document.createElement("script");
          script.src = url; script.async = false; script.onload = resolve; document.body.appendChild(script);
        })));`;
      this.inner.document.open();
      this.inner.document.write(`<body><script>${start}<\/script><script src="${url}"><\/script></body>`);
      this.inner.document.close();
      frame.addEventListener("load", () => {
        this.waiting.forEach((data) => this.tell(data));
        this.waiting = null;
      });
    }
    postMessage(data) {
      if (this.waiting) this.waiting.push(data);
      else this.tell(data);
    }
    tell(data) {
      this.inner.dispatchEvent(new MessageEvent("message", { data }));
    }
    terminate() {}
  };
