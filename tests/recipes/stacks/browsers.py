"""Programs with a screen: pages that only a browser can read, and a desktop."""

from __future__ import annotations

from tests.recipes.stacks.stack import Stack, apt, file, once

# A page that only a browser can read.
_PAGE = """\
<!doctype html><title>shop</title><ul id=list></ul><script>
fetch("/prices.json").then(answer => answer.json()).then(prices => {
  for (const price of prices) {
    const item = document.createElement("li");
    item.className = "price";
    item.textContent = "EUR " + price * 2;
    document.getElementById("list").append(item);
  }
});
</script>
"""
_SHOP = (file("/srv/shop/index.html", _PAGE), file("/srv/shop/prices.json", "[21, 8]\n"))
_SERVE = (
    "(cd /srv/shop && exec python3 -m http.server 8080 >/dev/null 2>&1 &); "
    + once("curl -sf localhost:8080 >/dev/null")
    + "; "
)

BROWSERS = (
    Stack(
        "scraping-with-selenium",
        "python-3.12",
        (
            apt("chromium chromium-driver"),
            "pip install selenium beautifulsoup4",
            *_SHOP,
            file(
                "/root/scrape.py",
                """\
from bs4 import BeautifulSoup
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

options = webdriver.ChromeOptions()
for option in ("--headless=new", "--no-sandbox"):
    options.add_argument(option)
browser = webdriver.Chrome(options, Service("/usr/bin/chromedriver"))
browser.get("http://localhost:8080/")
WebDriverWait(browser, 60).until(lambda page: page.find_elements("class name", "price"))
page = BeautifulSoup(browser.page_source, "html.parser")
print([item.text for item in page.select("li.price")])
browser.quit()
""",
            ),
        ),
        ((f"{_SERVE} python /root/scrape.py", "['EUR 42', 'EUR 16']"),),
    ),
    Stack(
        "scraping-with-playwright",
        "python-3.12",
        (
            apt("chromium"),
            "pip install playwright",
            *_SHOP,
            file(
                "/root/scrape.py",
                """\
from playwright.sync_api import sync_playwright

with sync_playwright() as playwright:
    browser = playwright.chromium.launch(
        executable_path="/usr/bin/chromium", args=["--no-sandbox"]
    )
    page = browser.new_page()
    page.goto("http://localhost:8080/")
    page.wait_for_selector("li.price")
    print(page.title(), page.locator("li.price").all_text_contents())
    page.screenshot(path="/root/shop.png")
    browser.close()
""",
            ),
        ),
        (
            (f"{_SERVE} python /root/scrape.py", "shop ['EUR 42', 'EUR 16']"),
            ("head -c 4 /root/shop.png | tail -c 3", "PNG"),
        ),
    ),
    Stack(
        "scraping-with-puppeteer",
        "node-22",
        (
            apt("chromium python3"),
            "mkdir -p /root/app && cd /root/app && npm init -y && "
            "npm install puppeteer-core cheerio",
            *_SHOP,
            file(
                "/root/app/scrape.js",
                """\
const puppeteer = require("puppeteer-core");
const cheerio = require("cheerio");
(async () => {
  const browser = await puppeteer.launch({
    executablePath: "/usr/bin/chromium", args: ["--no-sandbox"],
  });
  const page = await browser.newPage();
  await page.goto("http://localhost:8080/");
  await page.waitForSelector("li.price");
  const $ = cheerio.load(await page.content());
  console.log($("li.price").toArray().map(item => $(item).text()).join());
  await browser.close();
})();
""",
            ),
        ),
        ((f"{_SERVE} cd /root/app && node scrape.js", "EUR 42,EUR 16"),),
    ),
    Stack(
        "desktop",
        "debian-12",
        (apt("xvfb xauth xterm xdotool imagemagick"),),
        (
            (
                "Xvfb :7 -screen 0 640x480x24 >/dev/null 2>&1 & export DISPLAY=:7; "
                + once("xdotool getdisplaygeometry >/dev/null 2>&1")
                + "; xterm -e 'read line; echo $line > /root/typed; sleep 60' & "
                + once("xdotool search --class xterm >/dev/null 2>&1")
                + "; sleep 1; xdotool type hello; xdotool key Return; "
                + once("test -s /root/typed")
                + "; cat /root/typed; import -window root /root/screen.png; "
                "identify -format '%m %wx%h' /root/screen.png",
                "hello\nPNG 640x480",
            ),
        ),
    ),
)
